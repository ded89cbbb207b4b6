"""
What a phase of training trains, by one rule: what is new is trained, what is old is frozen (DESIGN 8).
"""
from nanochat.hybrid_gpt import CONTROLS, HybridGPT


def set_trained(model: HybridGPT, phase: str, gate: bool = False) -> None:
    """
    Sets requires_grad of every parameter for a phase: 'stage 1' (what surgery added to the base: Mamba blocks and value
    embeddings), 'unfrozen' (everything) or 'controls' (predictor and gate alone, for mode auto). gate: whether the gate
    learns along in the first two, which it does from narrow passes; the predictor is trained by 'controls' only.
    """
    for name, p in model.named_parameters():
        if name.startswith(CONTROLS):
            p.requires_grad_(phase == "controls" or (gate and name.startswith("gate.")))
        elif phase == "stage 1":
            block = model.transformer.h[int(name.split(".")[2])] if name.startswith("transformer.h.") else None
            p.requires_grad_(name.startswith("value_embeds.") or ".ve_gate." in name
                             or (block is not None and block.kind == "mamba"))
        else:
            assert phase in ("unfrozen", "controls"), phase
            p.requires_grad_(phase == "unfrozen")
