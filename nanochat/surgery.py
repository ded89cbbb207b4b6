"""
Surgery: functions over models that change the architecture and keep the function.

`insert` puts a Mamba block behind every attention block of a base GPT, and value embeddings into every second one, as
exact no-ops: the new writers into the residual stream (out_proj, c_proj) and the tables are zero, everything behind
them has its reference initialisation, so all of it learns from the first step on (zero outgoing weights do; zero
incoming ones would not).
"""
from dataclasses import replace

import torch

from nanochat.checkpoint_manager import build_model
from nanochat.gpt import GPT
from nanochat.hybrid_gpt import HybridConfig, HybridGPT

MAX_DELTA = 1e-4  # largest |delta logit|, fp32, that counts as "the function is unchanged"


@torch.no_grad()
def insert(base: GPT, seed: int) -> HybridGPT:
    """The hybrid of a base GPT, fp32, on the base's device; `seed` draws the new weights."""
    hybrid = build_model(HybridConfig.from_base(base.config), base.device)
    torch.manual_seed(seed)
    hybrid.init_weights()
    hybrid.transformer.wte.load_state_dict(base.transformer.wte.state_dict())
    hybrid.lm_head.load_state_dict(base.lm_head.state_dict())
    for i, block in enumerate(base.transformer.h):
        # strict=False: the hybrid's value-embedding gate is new; everything of the base's must land
        missing, unexpected = hybrid.transformer.h[2 * i].load_state_dict(block.state_dict(), strict=False)
        assert not unexpected and all("ve_gate" in k for k in missing)
    return hybrid


@torch.no_grad()
def extract(model: HybridGPT, mode: str | int) -> HybridGPT:
    """
    The sub-model of a uniform level as a model of its own: each attention and MLP matrix is the leading corner that the
    level uses, all else is copied. ValueError for a base GPT or a level that the model does not have.
    """
    if not isinstance(model.config, HybridConfig):
        raise ValueError("only a hybrid has sub-models to extract: make one with `python -m scripts.surgery`")
    width = model.resolve_widths(mode)[0]
    small = build_model(replace(model.config, top_width=width), model.device)
    for name, p in small.named_parameters():
        p.copy_(model.get_parameter(name)[tuple(slice(n) for n in p.shape)])
    return small


@torch.no_grad()
def probe(before: GPT, after: GPT, mode: str | int | None = None, seed: int = 0, rows: int = 4) -> dict[str, float]:
    """
    Compares two models, the first at `mode` (None: full width), in fp32 on random tokens as long as the context allows
    (512 at most):
    {'max_delta_logit', 'top1_agreement', 'probe_tokens'}.
    """
    assert before.compute_dtype == after.compute_dtype == torch.float32
    c = before.config
    idx = torch.randint(c.vocab_size, (rows, min(512, c.sequence_len)), generator=torch.Generator().manual_seed(seed))
    a, b = before(idx.to(before.device), widths=mode).cpu(), after(idx.to(after.device)).cpu()
    return {"max_delta_logit": float((a - b).abs().max()),
            "top1_agreement": float((a.argmax(-1) == b.argmax(-1)).float().mean()), "probe_tokens": idx.numel()}
