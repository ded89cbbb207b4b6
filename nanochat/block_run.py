"""
A run of a model's blocks in one call of csrc/decode.cpp, for a few tokens on a CPU without gradients. What a block takes in
Python is most of a small or narrow model's time. The same function, up to rounding, is GPT.run's loop over the blocks, with
the layers' own operators (cpu_decode.py), which serves where a run cannot.
"""
import copy
import weakref
from array import array

import torch

from nanochat.cpu_decode import operator
from nanochat.mamba_block import NORM_EPS

# csrc/decode.cpp's struct Block: its words, and those that change from call to call
WORDS, LEVEL, KEYS, PROJECTED = 26, 1, 10, 21
SIZES = ("D", "top", "hd", "group", "gate_in", "table_stride", "row_stride", "head_stride", "length", "d_inner", "H", "N",
         "G", "K", "conv_stride", "ssm_stride")
_runs = weakref.WeakKeyDictionary()  # looking up a small model's weights takes as long as a token


class BlockRun:
    """
    A model's blocks and the places of their weights, which must stay there for as long as the run is used. Not for several
    threads at once: each cache has its own, from `of`.
    """
    def __init__(self, model):
        c = self.config = model.config
        self.blocks, self.words, self.found, self.parameters = model.transformer.h, array("q"), [], []
        self.dtype, self.able = self.blocks[0].mlp.c_fc.weight.dtype, True
        sizes = dict.fromkeys(SIZES, 0) | {"D": c.n_embd, "top": c.top_width}

        def place(root, path, dtype=self.dtype):
            for name in path.split("."):
                owner = root._modules if name in root._modules else root._parameters
                root = owner[name]
                self.found.append((owner, name, root))
            plain = type(root) in (torch.nn.Parameter, torch.Tensor) and root.device.type == "cpu" and root.is_contiguous()
            self.able &= plain and root.dtype == dtype  # a sharded one, for instance, is not
            self.parameters.append(root)
            return root.data_ptr() if plain else 0
        for i, block in enumerate(self.blocks):
            words = [0] * WORDS
            words[2:4] = [place(block, f"mlp.{name}.weight") for name in ("c_fc", "c_proj")]
            if block.kind == "attention":
                attn, table = block.attn, model.value_table(i)
                words[4:8] = [place(block, f"attn.{name}.weight") for name in ("c_q", "c_k", "c_v", "c_proj")]
                sizes |= {"hd": attn.head_dim, "group": attn.group}
                if table is not None:
                    words[8:10] = place(block, "attn.ve_gate.weight"), place(model, f"value_embeds.{i}.weight")
                    sizes |= {"gate_in": attn.ve_gate.in_features, "table_stride": table.embedding_dim}
            else:
                m = block.mamba
                words[0], words[13:15] = 1, [place(block, f"mamba.{name}.weight") for name in ("in_proj", "out_proj")]
                words[15:21] = [place(block, f"mamba.{name}", torch.float32) for name in (
                    "conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D", "norm.weight")]
                sizes |= {"d_inner": m.d_inner, "H": m.nheads, "N": m.d_state, "G": m.ngroups, "K": m.d_conv}
            self.words.extend(words)
        self.sizes, self.gate = array("q", sizes.values()), array("q")
        if "gate" in model._modules:
            self.points = array("q", [c.exit_points.index(i) if i in c.exit_points else -1 for i in range(c.n_block)])
            self.gate.extend([*(place(model, f"gate.{name}", torch.float32) for name in (
                "c_fc.weight", "point.weight", "c_proj.weight", "c_proj.bias")), _place(self.points),
                model.gate.c_fc.out_features])
        self.state = self._state()

    def _state(self) -> list:
        """What the run relies on, of the parameters it has found."""
        return [(p.data_ptr(), p.dtype, p.stride()) for p in self.parameters] if self.able else []

    def _stale(self) -> bool:
        """Whether modules or parameters were replaced, or moved in memory, since."""
        replaced = any(owner.get(name) is not it for owner, name, it in self.found)
        return not self.able or replaced or self._state() != self.state

    @classmethod
    def of(cls, model) -> "BlockRun":
        """A run of its own for a cache of this model."""
        known = _runs.get(model)
        if known is None or known._stale():
            known = _runs[model] = cls(model)
        run = copy.copy(known)
        run.words, run.sizes = run.words[:], run.sizes[:]
        return run

    def takes(self, x: torch.Tensor, levels: list) -> bool:
        """Whether it runs states x (B, T, D) for which cpu_decode.serves holds through blocks of these levels."""
        return self.able and x.dtype == self.dtype and all(type(d) is int for d in levels)

    def __call__(self, first: int, last: int, idx: torch.Tensor, x: torch.Tensor, levels: list, rope, cache,
                 write_only: bool = False) -> torch.Tensor:
        """
        Blocks first, ..., last - 1 for the chunk that the cache expects: arguments and result as GPT.run's. write_only: the
        blocks only write their memory, and x comes back.
        """
        return self._run(first, last, idx, x, levels, rope, cache, write_only)[0]

    def ahead(self, first: int, last: int, idx, x, levels, rope, cache, bar) -> tuple[torch.Tensor, int, bool, float]:
        """
        Likewise for a single token of a model with a gate, but only up to the first exit point at which bar, two thresholds
        (see Controls), gives a control something to decide: the states there, how many blocks are done, whether there is
        something, and how sure the gate was when last asked.
        """
        return self._run(first, last, idx, x, levels, rope, cache, False, _place(self.gate), *bar)

    def _run(self, first, last, idx, x, levels, rope, cache, write_only, gate=None, leave=0.0, expand=0.0):
        records = self._place_memory(first, last, x, levels, cache, write_only)
        x = x.contiguous() if write_only else x.clone(memory_format=torch.contiguous_format)
        (cos, sin), (row, position), idx = rope, cache.chunk.places(), idx.long().contiguous()
        reached, sure = array("q", [0, 0]), array("f", [0])
        operator("blocks", self.dtype)(
            _place(self.words), _place(self.sizes), x.data_ptr(), idx.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            row.data_ptr(), position.data_ptr(), gate, _place(reached), _place(sure), idx.numel(), idx.size(1), first, last,
            len(self.blocks), cos.numel() // cos.size(-1), write_only, leave, expand, self.config.d_ref,
            self.config.norm_eps, NORM_EPS)
        for mixer, state, projected in records:
            mixer._record_step(state, projected)
        return x, reached[0], bool(reached[1]), sure[0]

    def _place_memory(self, first, last, x, levels, cache, write_only) -> list:
        """Writes the words that change; what Mamba states under a checkpoint are to remember of this call."""
        words, records, head_dim = self.words, [], self.config.head_dim
        k = conv = None
        for i in range(first, last):  # before anything changes
            if words[i * WORDS]:
                cache.views[i].state._check_room(x.size(1))
        for i in range(first, last):
            at, view, level = i * WORDS, cache.views[i], levels[i]
            words[at + LEVEL] = level
            if not words[at]:  # attention
                view.mark(level // head_dim)
                k = view.k
                words[at + KEYS], words[at + KEYS + 1] = k.data_ptr(), view.v.data_ptr()
                words[at + KEYS + 2] = 0 if view.heads is None else view.heads.data_ptr()
            else:
                state, place = view.state, 0
                conv, ssm = state._go_on()
                if state._record is not None:
                    mixer = self.blocks[i].mamba
                    projected = x.new_empty(*x.shape[:2], mixer.in_proj.out_features - (mixer.d_inner if write_only else 0))
                    records.append((mixer, state, projected))
                    place = projected.data_ptr()
                words[at + PROJECTED:at + WORDS] = array("q", (
                    place, conv.data_ptr(), state.conv_state.data_ptr(), ssm.data_ptr(), state.ssm_state.data_ptr()))
        if k is not None:
            self.sizes[6:9] = array("q", (k.stride(0), k.stride(1), k.size(2)))
        if conv is not None:
            self.sizes[14:] = array("q", (conv.stride(0), ssm.stride(0)))
        return records


def _place(words: array) -> int:
    return words.buffer_info()[0]
