"""
What a phase of training trains, by one rule: what is new is trained, what is old is frozen (DESIGN 8).

stage 1, behind insertion: the base is old; Mamba blocks are new, and so are value embeddings that the base did not have.
stages 2 and 3, behind growth: of every tensor the entries that it had before are old, except in the Mamba mixers, which
train whole.
"""
import math

from nanochat.checkpoint_manager import config_from_dict
from nanochat.growing import old_boxes
from nanochat.hybrid_gpt import CONTROLS, HybridConfig, HybridGPT


def stage_of(config: HybridConfig, provenance: dict | None) -> int:
    """
    The stage that a checkpoint is ready for: 1 at the base's width, then one more for every growth since. ValueError where
    its provenance does not fit its width.
    """
    grown = [p for p in history(provenance) if p.get("surgery") == "grow"]
    if (config.n_embd > config.d_ref) != bool(grown):
        raise ValueError(f"the checkpoint's width is {config.n_embd}, its base's {config.d_ref}, and its provenance names "
                         f"{len(grown)} growths: give --stage")
    return 1 + min(2, len(grown))


def history(provenance: dict | None) -> list[dict]:
    """What was done to a model, the latest first."""
    out = []
    while isinstance(provenance, dict):
        out.append(provenance)
        provenance = provenance.get("from")
    return out


def frozen_boxes(config: HybridConfig, provenance: dict | None) -> dict[str, list[tuple[slice, ...]]]:
    """
    Name -> the boxes of a grown model's tensors that stages 2 and 3 keep as they are: all that its latest growth found
    there, outside the Mamba mixers and the controls. ValueError where the provenance does not say what that was.
    """
    old = grown_from(provenance)
    if not (old.n_embd < config.n_embd and old.n_layer == config.n_layer and old.vocab_size == config.vocab_size
            and old.head_dim == config.head_dim and old.d_ref == config.d_ref):
        raise ValueError(f"the checkpoint says it was grown from width {old.n_embd} with {old.n_layer} layers, which cannot "
                         f"become its own {config.n_embd} with {config.n_layer}: its config.json was changed")
    return {name: boxes for name, boxes in old_boxes(old, config).items()
            if ".mamba." not in name and not name.startswith(CONTROLS)}


def grown_from(provenance: dict | None) -> HybridConfig:
    """The config that a model had before its latest growth. ValueError where its provenance does not say."""
    grown = next((p for p in history(provenance) if p.get("surgery") == "grow"), {})
    was = grown.get("old_config")
    try:
        return config_from_dict("hybrid", was if isinstance(was, dict) else {})
    except ValueError as e:
        raise ValueError("the checkpoint does not say what it was grown from, so there is no telling old entries from new: "
                         "grow it again with `python -m scripts.surgery --expand-from=...`, or train all with "
                         "--unfreeze") from e


def set_trained(model: HybridGPT, phase: str, gate: bool = False, boxes: dict | None = None) -> None:
    """
    Sets requires_grad of every parameter for a phase: 'stage 1' (what surgery added to the base: Mamba blocks, and value
    embeddings where it had none), 'stage 2' and 'stage 3' (all that is not wholly within its `boxes`, see frozen_boxes;
    setup_optimizers needs these too), 'unfrozen' (everything) or 'controls' (predictor and gate alone, for mode auto). gate:
    whether the gate learns along in the others, which it does from narrow passes; the predictor is trained by 'controls'
    only.
    """
    assert phase in ("stage 1", "stage 2", "stage 3", "unfrozen", "controls"), phase
    assert (boxes is not None) == (phase in ("stage 2", "stage 3")), "stages 2 and 3 need to know what is old"
    for name, p in model.named_parameters():
        if name.startswith(CONTROLS):
            p.requires_grad_(phase == "controls" or (gate and name.startswith("gate.")))
        elif phase == "stage 1":
            block = model.transformer.h[int(name.split(".")[2])] if name.startswith("transformer.h.") else None
            value = name.startswith("value_embeds.") or ".ve_gate." in name
            p.requires_grad_((value and not model.config.value_embeds)
                             or (block is not None and block.kind == "mamba"))
        elif boxes is not None:
            p.requires_grad_(not any(all((s.start, s.stop) == (0, n) for s, n in zip(box, p.shape))
                                     for box in boxes.get(name, ())))
        else:
            p.requires_grad_(phase == "unfrozen")


def trained_entries(model: HybridGPT, boxes: dict | None = None) -> int:
    """How many entries of its parameters a model trains after set_trained, those of `boxes`, which stay, left out."""
    return sum(p.numel() - sum(math.prod(s.stop - s.start for s in box) for box in (boxes or {}).get(name, ()))
               for name, p in model.named_parameters() if p.requires_grad)
