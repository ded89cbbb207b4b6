"""
Surgery: what changes the architecture and keeps the function, and the proof that it did.

`insert_state` puts a Mamba block behind every attention block of a base GPT, and value embeddings into every second one,
as exact no-ops: the new writers into the residual stream (out_proj, c_proj) and the tables are zero, everything behind
them has its reference initialisation, so all of it learns from the first step on (zero outgoing weights do; zero
incoming ones would not). Growth to larger widths is in growing.py, ordering before cutting widths in ordering.py. All of
them turn a State (weights made when asked for, streaming.py) into another; `insert` and `growing.grow` do it in memory.
"""
import re
import warnings
from dataclasses import replace

import torch

from nanochat.checkpoint_manager import build_model, load_state, optimizer_names
from nanochat.gpt import GPT, GPTConfig
from nanochat.hybrid_gpt import HybridConfig, HybridGPT
from nanochat.mamba_block import use_torch_form
from nanochat.streaming import Leaf, State, seeded, shapes_of

MAX_DELTA = 1e-4  # largest |delta logit|, fp32, that counts as "the function is unchanged"

# ---------------------------------------------------------------------------------------------------------------------
# Insert

def base_name(name: str, value_embeds: bool) -> str | None:
    """
    The base's name of a hybrid's tensor (attention block 2i is its layer i); None for what a base has not, with or without
    value embeddings.
    """
    block = re.fullmatch(r"(transformer\.h|value_embeds)\.(\d+)\.(.*)", name)
    if block and int(block[2]) % 2 == 0 and (value_embeds or not re.match(r"value_embeds|.*\.ve_gate", name)):
        return f"{block[1]}.{int(block[2]) // 2}.{block[3]}"
    return name if name in ("transformer.wte.weight", "lm_head.weight") else None


@torch.no_grad()
def insert_state(config: GPTConfig, base: State, seed: int) -> tuple[HybridConfig, State]:
    """The config and the state of the hybrid of a base GPT; `seed` draws the new weights."""
    new = HybridConfig.from_base(config)
    shapes = shapes_of(new)
    fresh = "", {}  # of the part that was asked for last

    def make(name, dtype):
        nonlocal fresh
        if own := base_name(name, config.value_embeds):
            return base.get(own, dtype)
        if "ve_gate" in name or name.startswith("value_embeds."):
            return torch.zeros(shapes[name], dtype=dtype)
        part = re.match(r"transformer\.h\.\d+\.|gate\.|predictor\.", name)[0]
        if fresh[0] != part:
            fresh = part, _reference(new, part, seed)
        return fresh[1][name[len(part):]].to(dtype)
    return new, State(shapes, make, base.dtype)


def _reference(config, part, seed):
    """The reference initialisation of a Mamba block, of the gate or of the predictor: {name: tensor}."""
    with seeded(seed, part):
        if part.startswith("transformer."):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Initializing zero-element")  # it has no exit point
                # its only Mamba block is like all others
                tiny = build_model(replace(config, n_layer=1, vocab_size=1, windows=(), x0_lambdas=()))
            tiny.init_weights()
            return tiny.transformer.h[1].state_dict()
        with torch.device("meta"):
            control = getattr(HybridGPT(config), part[:-1])
        control.to_empty(device="cpu").init_weights()
        return control.state_dict()


@torch.no_grad()
def insert(base: GPT, seed: int) -> HybridGPT:
    """The hybrid of a base GPT, in memory, fp32, on the base's device; `seed` draws the new weights."""
    config, state = insert_state(base.config, State.of(base), seed)
    hybrid = build_model(config, base.device)
    load_state(hybrid, state.dict(), "the hybrid's state")
    return hybrid


def insert_optimizers(states: list[dict]) -> list:
    """A base's optimizer state dicts under the hybrid's names, as a tree for save_lazy."""
    def rename(name):
        block = re.fullmatch(r"transformer\.h\.(\d+)\.(.*)", name)
        return f"transformer.h.{2 * int(block[1])}.{block[2]}" if block else name
    out = []
    for state in states:
        names = {i: rename(name) for i, name in optimizer_names(state).items()}
        out.append({"state": {i: {k: Leaf(v.shape, v.dtype, lambda v=v: v) for k, v in moments.items()}
                              for i, moments in state["state"].items()},
                    "param_groups": [{**g, "param_names": [names[i] for i in g["params"]]} for g in state["param_groups"]]})
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Extract

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


# ---------------------------------------------------------------------------------------------------------------------
# Proof

def probe_batch(config: GPTConfig, seed: int = 0) -> torch.Tensor:
    """
    Random tokens (rows, T) int64: 4 rows of at most 512; of a model too large for that, one of 96 (longer than a chunk of
    the Mamba scan).
    """
    large = config.n_layer * config.n_embd ** 2 > 1e7
    rows, T = (1, min(96, config.sequence_len)) if large else (4, min(512, config.sequence_len))
    return torch.randint(config.vocab_size, (rows, T), generator=torch.Generator().manual_seed(seed))


def compare(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """Two batches of logits: {'max_delta_logit', 'top1_agreement'}. A NaN in either makes the delta NaN."""
    return {"max_delta_logit": float((a - b).abs().max()),
            "top1_agreement": float((a.argmax(-1) == b.argmax(-1)).float().mean())}


@torch.no_grad()
def probe(before: GPT, after: GPT, mode: str | int | None = None, seed: int = 0, device=None) -> dict[str, float]:
    """
    Compares two models, the first at `mode` (None: full width), in fp32: `compare`'s figures and 'probe_tokens'. Streamed
    models (streaming.streamed) need the device that their weights come to.
    """
    assert before.compute_dtype == after.compute_dtype == torch.float32
    idx = probe_batch(before.config, seed)
    a, b = (model(idx.to(device or model.device), widths=widths).cpu() for model, widths in ((before, mode), (after, None)))
    return compare(a, b) | {"probe_tokens": idx.numel()}


@torch.no_grad()
def prove(before: GPT, after: GPT, cast: GPT | None = None, seed: int = 0, device="cpu") -> dict:
    """
    Surgery's proof, for streamed models or others, in fp32: `compare`'s figures and 'probe_tokens' at full width. Of two
    hybrids also, under 'level', those at the widest level that both have, and its 'width'. Under 'cast' those of a third
    model, the second as its file will hold it, against the second.
    """
    for model in (before, after, *([] if cast is None else [cast])):
        use_torch_form(model)  # on a GPU the kernels would multiply fp32 as TF32
    idx = probe_batch(before.config, seed).to(device)
    hybrids = isinstance(before.config, HybridConfig)
    width = max(set(before.config.levels) & set(after.config.levels)) if hybrids else None

    def logits(model):
        """At full width and at `width`, in one pass, since weights are made anew for each: rows may differ in width."""
        top, n = model.config.top_width, model.config.n_block
        if width in (None, top):
            return (model(idx).cpu(),) * 2
        widths = torch.tensor([[d] * n for d in (top, width) for _ in idx])
        return model(torch.cat((idx, idx)), widths=widths).cpu().chunk(2)
    (a, a_level), (b, b_level) = logits(before), logits(after)
    proof = compare(a, b) | {"probe_tokens": idx.numel()}
    if hybrids:
        proof["level"] = {"width": width, **compare(a_level, b_level)}
    if cast is not None:
        proof["cast"] = compare(b, cast(idx).cpu())
    return proof


def unchanged(proof: dict) -> bool:
    """Whether a proof says that the function is what it was, at every level that was looked at."""
    return all(p["max_delta_logit"] <= MAX_DELTA for p in (proof, proof.get("level", proof)))  # a NaN fails too


