"""
nanochat's checkpoints of any month. Nothing in them names the model's vintage, so it is told by the weights' names and
shapes and by the meta file. What a vintage computes differently from nanochat-d32 is folded into the weights where that is
exact, and set in the config (gpt.py) where it is not; docs/checkpoints.md says which is which.
"""
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch

from nanochat.gpt import GPTConfig
from nanochat.weight_files import Weights, some

PAD = 64         # vocabularies are padded to a multiple of it, from December 2025 on
TILE = 128       # short windows are rounded up to a multiple of it, from March 9, 2026 on
SMEAR_DIMS = 24  # leading dims that the smear's gate reads
OUR_GATE = 2.0   # our value-embedding gate is this times a sigmoid


class Vintage(NamedTuple):
    """
    What the nanochats of some weeks compute. gate: the factor in front of the value embeddings' gate, and channels: how many
    dims it reads (0: there are none). short(T): how many keys before its own a layer of type S sees at a context of T.
    """
    name: str
    since: str
    rope_base: float = 10000.0
    softcap: float = 15.0
    qk_scale: float = 1.0
    gate: float = 0.0
    channels: int = 0
    short: Callable[[int], int] = lambda T: T // 2


VINTAGES = {v.name: v for v in (
    Vintage("A", "October 13, 2025"),
    Vintage("A'", "December 23, 2025"),
    Vintage("B", "January 11, 2026"),
    Vintage("C", "January 11, 2026, with attention windows"),
    Vintage("D", "January 16, 2026", gate=2.0, channels=32),
    Vintage("E", "March 2, 2026", softcap=20.0, gate=2.0, channels=32),
    Vintage("F", "March 9, 2026", rope_base=100000.0, qk_scale=1.15, gate=3.0, channels=12,
            short=lambda T: -(-T // 3 // TILE) * TILE),
    Vintage("G", "March 14, 2026", rope_base=100000.0, qk_scale=1.2, gate=3.0, channels=12,
            short=lambda T: -(-T // 4 // TILE) * TILE),
)}
UNTOLD = {"E": "D"}  # a vintage that only its user can know -> what it looks like

# Weights of nanochats that were never, or only for days, in its main line, and what they belong to.
REFUSED = ((r"bigram_", "bigram embeddings"), (r"value_embed(_[AB])?(\.|$)|v0_lambdas", "the value embeddings of a January "
           "branch"), (r"\.bias$", "biases"))
META_FIELDS = {"sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"}


class Base(NamedTuple):
    """A nanochat checkpoint as a base GPT of ours: its config, its vintage, what was done to it, and its weights."""
    config: GPTConfig
    vintage: Vintage
    notes: list[str]
    weights: Weights


def padded(n: int) -> int:
    """A vocabulary's size with padding."""
    return -(-n // PAD) * PAD


def tell(names, fields: dict, gate_channels: int | None, where, named: str | None = None) -> Vintage:
    """
    The vintage of weights of these names (without wrappers' prefixes), with a meta file of these fields, whose gates of
    value embeddings read so many channels (None: there are none); or the one that `--vintage` named, if that can be.
    ValueError for a vintage that is not known, or that the file contradicts.
    """
    for pattern, feature in REFUSED:
        if found := [n for n in names if re.search(pattern, n)]:
            raise ValueError(f"{where} has {feature} ({found[0]}), which no released nanochat has kept: use a checkpoint of "
                             "nanochat's main line")
    if any(n.startswith(("smear", "backout")) for n in names):
        told = "G"
    elif gate_channels is not None:
        told = next((v.name for v in VINTAGES.values() if v.channels == gate_channels), None)
        if told is None:
            raise ValueError(f"{where} has value-embedding gates that read {gate_channels} channels; nanochat's read 32 or "
                             "12: it is of a vintage that this version does not know")
    elif "window_pattern" in fields:
        told = "C"
    elif any(n.endswith("_lambdas") for n in names):
        told = "B"
    else:
        told = "A"
    if named is None:
        return VINTAGES[told]
    named = named.upper()
    if named not in VINTAGES:
        raise ValueError(f"--vintage {named} is not known: choose one of {', '.join(VINTAGES)}")
    if UNTOLD.get(named, named).rstrip("'") != told:
        raise ValueError(f"{where} is not of vintage {named}: its weights and meta file are those of {told}; leave out "
                         "--vintage" + (f", or give --vintage {' or '.join(k for k, v in UNTOLD.items() if v == told)}"
                                        if told in UNTOLD.values() else ""))
    return VINTAGES[named]


def check_sizes(shapes: dict[str, torch.Size], fields: dict, where) -> None:
    """ValueError where depth, width, vocabulary or kv heads read from a base's weights are not those of its meta file."""
    n_layer = len({k.split(".")[2] for k in shapes if k.startswith("transformer.h.")})
    wte, c_k = shapes.get("transformer.wte.weight"), shapes.get("transformer.h.0.attn.c_k.weight")
    read, head_dim = {"n_layer": n_layer}, fields["n_embd"] // max(1, fields["n_head"])
    if wte is not None and len(wte) == 2:
        rows = wte[0] if wte[0] != padded(fields["vocab_size"]) else fields["vocab_size"]
        read |= {"vocab_size": rows, "n_embd": wte[1]}
    if c_k is not None and len(c_k) == 2 and c_k[0] % max(1, head_dim) == 0:
        read |= {"n_kv_head": c_k[0] // max(1, head_dim)}
    wrong = [f"{k} {v}, but the meta file says {fields[k]}" for k, v in read.items() if v != fields[k]]
    if wrong:
        raise ValueError(f"{where} has {'; '.join(wrong)}: use the meta file that was saved with it")


def read_windows(pattern, vintage: Vintage, config: GPTConfig, where) -> tuple[int, ...]:
    """
    Keys before its own that a token sees in each layer (0: all): the pattern, of S (short) and L (the whole context), is
    tiled over the layers, and the last one is always L. ValueError for a pattern of other letters.
    """
    if not isinstance(pattern, str) or not pattern or set(pattern.upper()) - {"S", "L"}:
        raise ValueError(f"the meta file of {where} has the window_pattern {pattern!r}; it must be of the letters S and L")
    short = vintage.short(config.sequence_len)
    windows = [short if pattern[i % len(pattern)] in "sS" else 0 for i in range(config.n_layer)]
    windows[-1] = 0
    return tuple(windows) if any(windows) else ()


def shapes_of(vintage: Vintage, config: GPTConfig, rows: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a vintage's weights, with a vocabulary of so many rows."""
    D, L, kv = config.n_embd, config.n_layer, config.n_kv_head
    out = {"transformer.wte.weight": (rows, D), "lm_head.weight": (rows, D)}
    for i in range(L):
        block = {"attn.c_q": (D, D), "attn.c_k": (kv * config.head_dim, D), "attn.c_v": (kv * config.head_dim, D),
                 "attn.c_proj": (D, D), "mlp.c_fc": (4 * D, D), "mlp.c_proj": (D, 4 * D)}
        if vintage.channels and config.has_value_table(i):
            block["attn.ve_gate"] = (kv, vintage.channels)
            out[f"value_embeds.{i}.weight"] = (rows, kv * config.head_dim)
        out |= {f"transformer.h.{i}.{name}.weight": shape for name, shape in block.items()}
    if vintage.name[0] != "A":
        out |= {"resid_lambdas": (L,), "x0_lambdas": (L,)}
    if vintage.name == "G":
        out |= {"smear_gate.weight": (1, SMEAR_DIMS), "smear_lambda": (1,), "backout_lambda": (1,)}
    return out


def check_shapes(own: dict, given: dict[str, torch.Size], vintage: Vintage, where) -> None:
    """ValueError that names weights missing, unknown or mis-shaped for their vintage."""
    faults = []
    if missing := [k for k in own if k not in given]:
        faults.append(f"missing {some(missing)}")
    if extra := [k for k in given if k not in own]:
        faults.append(f"unexpected {some(extra)}")
    if bad := [f"{k} {tuple(given[k])} instead of {own[k]}" for k in own if k in given and tuple(given[k]) != own[k]]:
        faults.append(f"of another shape {some(bad)}")
    if faults:
        raise ValueError(f"{where} does not fit a nanochat of vintage {vintage.name} with its meta file: "
                         f"{'; '.join(faults)}. Use the checkpoint with the meta file it was saved with")


def convert(weights: Weights, fields: dict, where, named: str | None = None) -> Base:
    """
    A nanochat checkpoint's weights as those of our base GPT. fields: its meta file's `model_config`; named: the vintage that
    the user says it is. ValueError for weights that contradict the meta file, or a vintage that cannot be read.
    """
    shapes = {k: v.shape for k, v in weights.specs.items()}
    gates = [s for k, s in shapes.items() if k.endswith(".attn.ve_gate.weight") and len(s) == 2]
    vintage = tell(list(shapes), fields, gates[0][1] if gates else None, where, named)
    if unknown := sorted(set(fields) - META_FIELDS - {"window_pattern"}):
        raise ValueError(f"the meta file of {where} has fields that this version does not know: {some(unknown)}")
    if missing := sorted(META_FIELDS - set(fields)):
        raise ValueError(f"the meta file of {where} lacks {some(missing)}")
    sizes = {k: fields[k] for k in META_FIELDS}
    if bad := [f"{k} {v!r}" for k, v in sizes.items() if type(v) is not int or v < 1]:
        raise ValueError(f"the meta file of {where} has {bad[0]}; it must be a whole number of at least 1")
    check_sizes(shapes, fields, where)
    config = GPTConfig(**sizes, rope_base=vintage.rope_base, softcap=vintage.softcap, qk_scale=vintage.qk_scale,
                       value_embeds=vintage.channels > 0)
    rows = shapes["transformer.wte.weight"][0] if "transformer.wte.weight" in shapes else config.vocab_size
    if vintage.name == "A" and rows != config.vocab_size:
        vintage = VINTAGES["A'"]
    check_shapes(shapes_of(vintage, config, rows), shapes, vintage, where)
    if config.head_dim < vintage.channels:
        raise ValueError(f"{where} has value-embedding gates of {vintage.channels} channels and heads of {config.head_dim} "
                         "dims: a head must have at least as many")
    return _Conversion(weights, vintage, config, rows, where).base(fields)


class _Conversion:
    """What `convert` does to each weight."""
    def __init__(self, weights: Weights, vintage: Vintage, config: GPTConfig, rows: int, where):
        self.weights, self.vintage, self.config, self.rows, self.where = weights, vintage, config, rows, where
        cut = rows - config.vocab_size
        self.notes = [f"{cut} padded rows of the vocabulary are cut"] if cut else []
        self.scale = [1.0] * (config.n_layer + 1)  # of the residual stream before each layer, and after the last

    def base(self, fields: dict) -> Base:
        """The converted checkpoint."""
        c, later = self.config, {}
        if fields.get("window_pattern") is not None or self.vintage.name == "C":
            later["windows"] = read_windows(fields.get("window_pattern"), self.vintage, c, self.where)
        if "resid_lambdas" in self.weights.specs:
            later |= self._lambdas()
        if self.vintage.name == "G":
            later |= self._smear_and_backout()
        config = GPTConfig(**{**{f: getattr(c, f) for f in c.__dataclass_fields__}, **later})
        if self.vintage.channels and self.vintage.gate != OUR_GATE:
            self.notes.append(f"value embeddings are multiplied by {self.vintage.gate / OUR_GATE:g}, their gates padded "
                              "with zeros")
        if carried := config.later_features:
            self.notes.append(f"computed as that nanochat does: {', '.join(carried)}")
        specs = {k: torch.empty(self._shape(k), dtype=v.dtype, device="meta") for k, v in self.weights.specs.items()
                 if "." in k and not k.startswith("smear")}
        return Base(config, self.vintage, self.notes, Weights(specs, self._read))

    def _vector(self, name: str) -> list[float]:
        values = self.weights.read(name).double().flatten().tolist()
        if not all(map(math.isfinite, values)):
            raise ValueError(f"{name} in {self.where} is not finite: the file is damaged, or its training diverged")
        return values

    def _lambdas(self) -> dict:
        """
        A residual stream that is scaled before every layer is one that is not, in other units: each layer writes less by
        what the stream has been scaled, and reads it normed, so that units do not matter.
        """
        resid, x0 = self._vector("resid_lambdas"), self._vector("x0_lambdas")
        for i, r in enumerate(resid):
            if r <= 0:
                raise ValueError(f"resid_lambdas[{i}] in {self.where} is {r:g}: a residual stream that is not scaled by a "
                                 "number above 0 cannot be folded into the layers' weights")
            self.scale[i + 1] = self.scale[i] * r
        if any(s != 1 for s in self.scale):
            self.notes.append("residual lambdas are divided out of the layers' output matrices")
        factors = tuple(m / s for m, s in zip(x0, self.scale[1:]))
        return {"x0_lambdas": factors} if any(factors) else {}

    def _smear_and_backout(self) -> dict:
        (smear,), (backout,) = self._vector("smear_lambda"), self._vector("backout_lambda")
        out = {"smear_gate": tuple(self._vector("smear_gate.weight")), "smear_lambda": smear} if smear else {}
        middle = min(self.config.n_layer // 2 + 1, self.config.n_layer)
        return out | ({"backout_lambda": backout * self.scale[middle] / self.scale[-1]} if backout else {})

    def _shape(self, name: str) -> torch.Size:
        shape = list(self.weights.specs[name].shape)
        if name.startswith(("transformer.wte", "lm_head", "value_embeds.")):
            shape[0] = self.config.vocab_size
        if name.endswith("ve_gate.weight"):
            shape[1] = min(32, self.config.head_dim)
        return torch.Size(shape)

    def _read(self, name: str) -> torch.Tensor:
        """A weight of ours, in the stored dtype where nothing is computed, else in fp32."""
        w, block = self.weights.read(name), re.fullmatch(r"transformer\.h\.(\d+)\.(?:attn|mlp)\.(.*)\.weight", name)
        if block and block[2] == "c_proj" and (scale := self.scale[int(block[1]) + 1]) != 1:
            return (w.double() / scale).float()
        if block and block[2] == "ve_gate":
            return torch.nn.functional.pad(w, (0, self._shape(name)[1] - w.size(1)))
        if name.startswith("value_embeds.") and self.vintage.gate != OUR_GATE:
            return w[:self.config.vocab_size].float() * (self.vintage.gate / OUR_GATE)
        return w[:self._shape(name)[0]]
