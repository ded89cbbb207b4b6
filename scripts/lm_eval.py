r"""
EleutherAI's lm-evaluation-harness on our models: its own command, to which 'adamba' is made known. Install it with
`pip install -e ".[eval]"`.

    python -m scripts.lm_eval --model adamba --model_args pretrained=FOLDER,mode=normal --tasks arc_easy --batch_size 8

pretrained is what --checkpoint takes elsewhere; mode, depth, budget and lossless=True choose the compute (mode=auto, too).
All other flags, and the tables, are the harness's: `python -m scripts.lm_eval --help`.
"""
from nanochat.common import cli


@cli
def main() -> None:
    try:
        from lm_eval._cli import HarnessCLI
        from lm_eval.api.registry import register_model
        from lm_eval.utils import setup_logging
    except ImportError as e:
        raise ImportError(f"the evaluation harness cannot be imported ({e}): install it with "
                          "`pip install -e \".[eval]\"`") from e
    from nanochat.lm_eval_model import AdambaLM
    register_model("adamba")(AdambaLM)
    setup_logging()
    harness = HarnessCLI()
    harness.execute(harness.parse_args())


if __name__ == "__main__":
    main()
