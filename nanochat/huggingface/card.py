"""The model card (README.md) of an exported repository, and the one that lists a repository's variants."""
import json
from typing import NamedTuple

from nanochat.checkpoint_manager import build_model
from nanochat.gpt import GPTConfig

LICENSE = "mit"
PLACE = "PATH_OR_REPOSITORY"  # what a card says where it does not know under which name it will be published


class Place(NamedTuple):
    """Where a repository will be: USER/NAME on the hub (None: not known), and the folder in it (None: its top)."""
    repo: str | None = None
    variant: str | None = None

    @property
    def arguments(self) -> str:
        """The first arguments of from_pretrained."""
        subfolder = f', subfolder="{self.variant}"' if self.variant else ""
        return f'"{self.repo or PLACE}"{subfolder}'


def mode_rows(config: GPTConfig, quality: dict[str, float]) -> list[dict]:
    """
    Per mode its width, FLOPs per token of the whole model behind half a context (as a number, and as a share of full width),
    and its bits per byte, where `quality` (mode -> bits per byte) has it. Modes of equal width are one row.
    """
    model = build_model(config, "meta")
    full = sum(c.flops for c in model.cost(context=config.sequence_len / 2).values())
    rows = []
    for mode, width in config.distinct_modes.items():
        if width in (row["width"] for row in rows):
            continue
        flops = sum(c.flops for c in model.cost(mode, config.sequence_len / 2).values())
        rows.append({"mode": mode, "width": width, "flops": flops, "share": flops / full, "bpb": quality.get(mode)})
    return rows


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def frontmatter() -> str:
    """What the hub reads of a card."""
    return (f"---\nlicense: {LICENSE}\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- adamba\n"
            "- nanochat\n---\n")


def modes_section(config: GPTConfig, quality: dict[str, float]) -> str:
    rows = mode_rows(config, quality)
    known = any(row["bpb"] is not None for row in rows)
    header = ["mode", "width", "FLOPs per token, whole model", "share of full compute"]
    header += ["bits per byte"] if known else []
    body = [[row["mode"], str(row["width"]), f"{row['flops']:.3g}", f"{row['share']:.0%}",
             *([f"{row['bpb']:.4f}" if row["bpb"] is not None else "not measured"] if known else [])] for row in rows]
    note = "" if known else "\n\nThe quality of the modes has not been measured for this card."
    return f"## Modes\n\n{table(header, body)}{note}\n"


def calibration_section(calibration: dict | None) -> str:
    if not calibration:
        return ("## Calibration\n\nThe thresholds of mode `auto` are not calibrated. That mode runs in the Adamba package "
                "only.\n")
    shown = {k: v for k, v in calibration.items() if isinstance(v, (int, float, str, bool))}
    return ("## Calibration\n\nMode `auto` (in the Adamba package) is calibrated:\n\n"
            f"```json\n{json.dumps(shown, indent=1)}\n```\n")


def provenance_section(known: dict) -> str:
    """known: the `adamba` entry of the repository's config.json."""
    lines, step = [], known.get("provenance")
    while isinstance(step, dict):
        lines.append(f"- {_step(step)}")
        step = step.get("from")
    proof = known.get("proof")
    if proof and "max_delta_logit" in proof:
        lines.append(f"- proof of the last change of architecture: max |delta logit| {proof['max_delta_logit']:.2e} over "
                     f"{proof.get('probe_tokens', '?')} tokens, top-1 agreement {proof.get('top1_agreement', 0):.2%}, "
                     "before and after it, in fp32")
    if known.get("val_bpb") is not None:
        lines.append(f"- held-out bits per byte at full width at the end of training: {known['val_bpb']:.4f}")
    lines.append(f"- tokenizer fingerprint: `{known['tokenizer_fingerprint']}`")
    return "## Provenance\n\n" + "\n".join(lines) + "\n"


def _step(step: dict) -> str:
    if step.get("surgery") == "insert":
        words = "Mamba-2 blocks and value embeddings inserted into a base GPT, the function unchanged"
    elif step.get("surgery") == "grow":
        words = f"grown from width {step.get('old_config', {}).get('n_embd', '?')}, the function unchanged"
    elif "trained" in step:
        words = f"trained ({step['trained']}, {step.get('steps', '?')} steps)"
    elif "extracted" in step:
        words = f"cut to mode {step['extracted']}, the function of that mode unchanged"
    else:
        words = "made from another checkpoint"
    source = step.get("source_sha256")
    return words + (f", from the file with SHA-256 `{str(source)[:16]}`" if source else "")


def usage_section(place: Place, remote_code: bool, mode: str | None) -> str:
    trust = ", trust_remote_code=True" if remote_code else ""
    modes = f'# less compute: from_pretrained(..., mode="{mode}"), or exit_depth=N for the first N blocks\n' if mode else ""
    return f"""## Use

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({place.arguments})
model = AutoModelForCausalLM.from_pretrained({place.arguments}{trust}, dtype=torch.bfloat16)
{modes}
chat = [{{"role": "user", "content": "Why is the sky blue?"}}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True).to(model.device)
answer = model.generate(**ids, max_new_tokens=100)
print(tokenizer.decode(answer[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))
```
"""


def model_card(config: GPTConfig, known: dict, quality: dict[str, float], place: Place, remote_code: bool) -> str:
    """
    The card of one model. known: the `adamba` entry of its config.json. quality: mode -> bits per byte, as measured. Only
    what is known is said: no name of a folder, and none of a repository that was not given.
    """
    count = build_model(config, "meta").num_params()["total"]
    title = place.variant or (place.repo or "").split("/")[-1] or ("Adamba" if remote_code else "nanochat")
    kind = ("An Adamba: an elastic language model of attention and Mamba-2 blocks with nested widths, made from a nanochat"
            if remote_code else "A nanochat base GPT")
    mode = next((m for m, d in config.modes.items() if d in config.levels[-2:-1]), None)
    parts = [frontmatter(), f"# {title}\n", f"{kind}: {count:,} parameters, width {config.n_embd}, {config.n_block} blocks, "
             f"a context of {config.sequence_len} tokens, a vocabulary of {config.vocab_size}.\n",
             usage_section(place, remote_code, mode if remote_code else None)]
    if remote_code:
        parts += [modes_section(config, quality), calibration_section(known.get("calibration"))]
    elif quality:
        parts.append(f"## Quality\n\nBits per byte: {next(iter(quality.values())):.4f}\n")
    return "\n".join([*parts, provenance_section(known), f"## Licence\n\n{LICENSE.upper()}\n"])


def variants_card(repo: str, variants: dict[str, dict]) -> str:
    """The card of a repository with a folder for each variant: name -> its config.json."""
    rows = []
    for name, config in sorted(variants.items()):
        remote = config.get("model_type") == "adamba"
        width = config.get("n_embd") or config.get("hidden_size", "?")
        layers = config.get("n_layer" if remote else "num_hidden_layers", 0)
        blocks = layers * (2 if config.get("hybrid") else 1)
        parameters = config.get("adamba", {}).get("parameters")
        rows.append([f"[`{name}`]({name})", f"{parameters:,}" if parameters else "?", str(width), str(blocks),
                     ", ".join(config.get("modes", {})) or "full width only", config.get("dtype", "?")])
    example = Place(repo, sorted(variants)[-1])
    return "\n".join([frontmatter(), f"# {repo.split('/')[-1]}\n", "Each folder of this repository is a model of its own.\n",
                      table(["variant", "parameters", "width", "blocks", "modes", "dtype"], rows) + "\n",
                      usage_section(example, True, None), f"## Licence\n\n{LICENSE.upper()}\n"])
