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
        self.blocks, self.words, self.places = model.transformer.h, array("q"), []
        sizes = dict.fromkeys(SIZES, 0) | {"D": c.n_embd, "top": c.top_width}
        self.dtype, self.able = self.blocks[0].mlp.c_fc.weight.dtype, True

        def place(module, name="weight", dtype=self.dtype):
            p = getattr(module, name)
            plain = type(p) in (torch.nn.Parameter, torch.Tensor) and p.device.type == "cpu" and p.is_contiguous()
            self.able &= plain and p.dtype == dtype  # a sharded one, for instance, is not
            self.places.append((module._parameters, name))
            return p.data_ptr() if plain else 0
        for i, block in enumerate(self.blocks):
            words = [0] * WORDS
            words[2:4] = place(block.mlp.c_fc), place(block.mlp.c_proj)
            if block.kind == "attention":
                attn, table = block.attn, model.value_table(i)
                words[4:8] = [place(m) for m in (attn.c_q, attn.c_k, attn.c_v, attn.c_proj)]
                sizes |= {"hd": attn.head_dim, "group": attn.group}
                if table is not None:
                    words[8:10] = place(attn.ve_gate), place(table)
                    sizes |= {"gate_in": attn.ve_gate.in_features, "table_stride": table.embedding_dim}
            else:
                m = block.mamba
                words[0], words[13:15] = 1, [place(m.in_proj), place(m.out_proj)]
                words[15:21] = [place(owner, name, torch.float32) for owner, name in (
                    (m.conv1d, "weight"), (m.conv1d, "bias"), (m, "dt_bias"), (m, "A_log"), (m, "D"), (m.norm, "weight"))]
                sizes |= {"d_inner": m.d_inner, "H": m.nheads, "N": m.d_state, "G": m.ngroups, "K": m.d_conv}
            self.words.extend(words)
        self.sizes, self.gate = array("q", sizes.values()), array("q")
        if gate := getattr(model, "gate", None):
            self.points = array("q", [c.exit_points.index(i) if i in c.exit_points else -1 for i in range(c.n_block)])
            self.gate.extend([*(place(owner, name, torch.float32) for owner, name in (
                (gate.c_fc, "weight"), (gate.point, "weight"), (gate.c_proj, "weight"), (gate.c_proj, "bias"))),
                _place(self.points), gate.c_fc.out_features])

        self.at = self._at() if self.able else None

    def _at(self) -> list[int]:
        return [parameters[name].data_ptr() for parameters, name in self.places]

    @classmethod
    def of(cls, model) -> "BlockRun":
        """A run of its own for a cache of this model."""
        known = _runs.get(model)
        if known is None or not known.able or known._at() != known.at:
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
        (cos, sin), (row, position), idx = rope, cache.chunk.places(), idx.contiguous()
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
                    state._check_room(x.size(1))
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
