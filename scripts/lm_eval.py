r"""
lm-eval's own command with our models, in any mode: every flag but --model and --model_args is lm-eval's.

    python -m scripts.lm_eval --model adamba --model_args pretrained=FOLDER,mode=normal --tasks arc_easy --batch_size 8

pretrained is a checkpoint's folder or an exported repository's. mode: ghost, whisper, normal, think, god, a width, or auto
(with budget=); depth=N exits after N blocks; lossless=True generates full compute's answers by drafts. Text begins with
<|bos|> (add_bos=False: not). Needs `pip install -e ".[eval]"`.
"""
import sys

from nanochat.common import cli


@cli
def main(argv=None) -> None:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as e:
        raise ImportError(f"lm-eval cannot be imported ({e}): run `pip install -e '.[eval]'` in this folder") from e
    import nanochat.huggingface.lm_eval_model  # noqa: F401  (registers 'adamba')
    if argv is not None:
        sys.argv = ["lm_eval", *argv]
    cli_evaluate()


if __name__ == "__main__":
    main()
