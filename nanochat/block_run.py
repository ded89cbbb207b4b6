"""
A run of a model's blocks in one call of csrc/decode.cpp, for a few tokens on a CPU without gradients. What a block takes in
Python is most of a small or narrow model's time. The same function, up to rounding, is GPT.run's loop over the blocks, with
the layers' own operators (cpu_decode.py), which serves where a run cannot.
"""
import copy
import weakref
from array import array
from operator import is_

import torch

from nanochat.cpu_decode import DTYPES, MAX_ROWS, PREDICTOR, address, operator, plain
from nanochat.mamba_block import NORM_EPS
from nanochat.sampling import NOT_FINITE

# csrc/decode.cpp's struct Block: its words, and those that change from call to call
WORDS, LEVEL, KEYS, HEADS, PROJECTED = 26, 1, 10, 12, 21
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
        assert not c.later_features, "the compiled run of blocks computes nanochat-d32's architecture"
        self.blocks, self.words, self.found, self.parameters = model.transformer.h, array("q"), {}, []
        self.dtype = self.blocks[0].mlp.c_fc.weight.dtype
        self.able = self.dtype in DTYPES
        sizes = dict.fromkeys(SIZES, 0) | {"D": c.n_embd, "top": c.top_width}

        def place(root, path, dtype=self.dtype):
            for name in path.split("."):
                owner = root._modules if name in root._modules else root._parameters
                root = owner[name]
                self.found[id(owner), name] = owner, name, root
            self.able &= plain(root) and root.dtype == dtype
            self.parameters.append(root)
            return root.data_ptr() if plain(root) else 0
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
                "c_fc.weight", "point.weight", "c_proj.weight", "c_proj.bias")), address(self.points),
                model.gate.c_fc.out_features])
        self.predictor = None
        if "predictor" in model._modules:
            self.predictor = model.predictor, [place(model, f"predictor.{name}", torch.float32) for name in PREDICTOR]
        self.found["h"] = model.transformer._modules, "h", self.blocks
        for i, block in enumerate(self.blocks):
            self.found[i] = self.blocks._modules, str(i), block
        self.table, self.head = place(model, "transformer.wte.weight"), place(model, "lm_head.weight")
        self.found, self.state = list(zip(*self.found.values())), self._state() if self.able else []

    def _state(self) -> list:
        """Where the parameters lie that it has found. (Another view of the same memory would not be noticed.)"""
        return list(map(torch.Tensor.data_ptr, self.parameters))

    def stale(self) -> bool:
        """Whether modules or parameters were replaced, or moved in memory, since, or none of this can be told."""
        owners, names, them = self.found
        return not self.able or not all(map(is_, map(dict.get, owners, names), them)) or self._state() != self.state

    @classmethod
    def of(cls, model) -> "BlockRun":
        """A run of its own for a cache of this model."""
        known = _runs.get(model)
        if known is None or known.stale():
            known = _runs[model] = cls(model)
        run = copy.copy(known)
        run.words, run.sizes = run.words[:], run.sizes[:]
        run.let_go()
        return run

    def let_go(self) -> None:
        """Holds none of a cache's memory: it is about to get another."""
        self.held = [(None, None)] * len(self.blocks)

    def takes(self, dtype: torch.dtype, levels: list) -> bool:
        """Whether it takes states of this type, where cpu_decode.serves_tokens does, through blocks of these levels."""
        return self.able and dtype == self.dtype and all(type(d) is int for d in levels)

    def __call__(self, first: int, last: int, idx: torch.Tensor, x: torch.Tensor | None, levels: list, cache,
                 write_only: bool = False) -> torch.Tensor:
        """
        Blocks first, ..., last - 1 for the chunk that the cache expects: arguments and result as GPT.run's. write_only: the
        blocks only write their memory, and x comes back.
        """
        return self._run(first, last, idx, x, levels, cache, write_only)[0]

    def ahead(self, first: int, last: int, idx, x, levels, cache, bar) -> tuple[torch.Tensor, int, bool, float]:
        """
        Likewise for a single token of a model with a gate, but only up to the first exit point at which bar, two thresholds
        (see Controls), gives a control something to decide: the states there, how many blocks are done, whether there is
        something, and how sure the gate was when last asked.
        """
        return self._run(first, last, idx, x, levels, cache, False, address(self.gate), *bar)

    def greedy(self, text: list[int], limit: int, stop, levels: list, depth: int, cache, late=None, waiting=None, bar=None):
        """
        One row's likeliest next tokens, up to `limit` or a token in `stop`: runs `text`, whose tokens before the last are
        the prompt, then each token as it comes but for the last, for the positions that the cache expects. depth: how many
        blocks update each from the text's last on; bar: as for `ahead`, and the gate may end it before. With a text of one
        token: late, the tokens before it (1, n) and their states (1, n, D), if they owe blocks their memory, at the same
        levels; waiting, the cache.Prompt that waits. A prompt goes through a block, and what is owed is written, when a
        token comes by, and no sooner. Returns the tokens; how many blocks have updated each that was run, from the text's
        last on; and, where something is to be decided on the way of the next, or a long prompt must go on, before which
        block, its states there (1, 1, D), and how sure the gate was, or None. The cache has taken all but that one.
        """
        c, prompt, owed = self.config, len(text) - 1, 0 if late is None else late[0].size(1)
        assert limit > 0 and not (prompt and (owed or waiting)), "a prompt comes before all that could owe something"
        start, ran, held = cache.chunk.start + prompt, 0 if prompt else len(self.blocks), 0
        if waiting is not None:
            ran = waiting.ran
            if waiting.idx.size(1) + owed <= MAX_ROWS:  # a longer one goes on where products of many rows are faster
                prompt = held = waiting.idx.size(1)
        front = prompt + owed
        assert not held or start == front, "what waits for a block is all that came before"
        self._check_ids(min(text), max(text))
        states = torch.empty(1, front + limit, c.n_embd, dtype=self.dtype, device="cpu")
        logits = torch.empty(c.vocab_size, dtype=torch.float32, device="cpu")
        records = self._place_memory(0, len(self.blocks), states, levels, cache, False)
        assert not records, "a cache under a checkpoint decodes token by token"
        tokens, depths = array("q", bytes(8 * (front + limit + 1))), array("q", bytes(8 * limit))
        behind, stops = array("q", cache.behind), array("q", stop)
        if held:
            tokens[:held], states[:, :held] = array("q", waiting.idx[0].tolist()), waiting.x
        if owed:
            tokens[held:front], states[:, held:front] = array("q", late[0][0].tolist()), late[1]
        tokens[front + 1 - len(text):front + 1] = array("q", text)
        answer = array("q", [start, limit, prompt, owed, address(stops), len(stops),
                             address(tokens) + front * tokens.itemsize, address(depths), states[:, front:].data_ptr(),
                             address(behind), self.head, logits.data_ptr(), c.vocab_size])
        reached, sure = array("q", [0, 0, ran]), array("f", [0])
        cos, sin = cache.chunk.tables
        operator("greedy", self.dtype)(
            address(self.words), address(self.sizes), address(answer), self.table, cos.data_ptr(), sin.data_ptr(),
            None if bar is None else address(self.gate), address(reached), address(sure), len(self.blocks), depth,
            *(bar or (0.0, 0.0)), c.softcap, c.d_ref, c.norm_eps, NORM_EPS)
        done, at, ran = reached
        if tokens[front + done] < 0:
            raise ValueError(NOT_FINITE)
        assert done or at, "a prompt that is not here must have begun"
        end = front + done
        first, late, waits = end - max(behind), None, None
        if first < end:
            late = _some(tokens, first, end), states[:, first:end]
        if prompt and ran < len(self.blocks) and (waiting is None or ran > waiting.ran):
            waits = _some(tokens, 0, prompt), states[:, :prompt]
        cache.took(len(text) - 1 + done, late, levels, behind.tolist(), ran, waits)
        undecided = (at, states[:, end:end + 1], sure[0]) if at else None
        return tokens[front + 1:end + 1].tolist(), depths[:done].tolist(), undecided

    def plan(self, prompt: list[int], budget: float, price: float, shares: torch.Tensor) -> torch.Tensor:
        """
        The widths that the predictor picks for one prompt, (1, n_block) int64: as confidence_probe.choose does of its
        values at this budget and price; shares (n_block, n_levels) fp64.
        """
        self._check_ids(min(prompt), max(prompt))
        c, (predictor, weights) = self.config, self.predictor
        n_block, gains, hidden = predictor.out_weight.shape
        ids, budget, price = array("q", prompt), array("f", (budget,)), array("d", (price,))
        chosen, values = array("q", bytes(8 * n_block)), array("f", bytes(4 * n_block * (gains + 1)))
        operator("predictor", self.dtype)(
            address(ids), None, self.table, *weights, address(budget), address(values), shares.data_ptr(), address(price),
            address(chosen), 1, len(ids), c.n_embd, hidden, predictor.BUMPS, n_block, gains, c.d_ref, c.norm_eps,
            predictor.CAP)
        return torch.frombuffer(array("q", [c.levels[i] for i in chosen]), dtype=torch.long)[None]

    def _check_ids(self, low, high):
        if not 0 <= low <= high < self.config.vocab_size:
            raise ValueError(f"token ids from {low} to {high} do not fit the vocabulary of {self.config.vocab_size}: use "
                             "the tokenizer that the model was trained with")

    def _run(self, first, last, idx, x, levels, cache, write_only, gate=None, leave=0.0, expand=0.0):
        c, chunk, n = self.config, cache.chunk, idx.numel()
        if first == 0:
            low, high = (idx.item(),) * 2 if n == 1 else map(int, idx.aminmax())
            self._check_ids(low, high)
        idx = idx.long().contiguous()
        if write_only:
            out = x.contiguous()
        else:
            out = idx.new_empty(*idx.shape, c.n_embd, dtype=self.dtype)
            if first:
                out.copy_(x)
        records = self._place_memory(first, last, out, levels, cache, write_only)
        if chunk.uniform:
            (cos, sin), row, position, angles = chunk.tables, None, None, chunk.T
            offset = chunk.start * cos.size(-1) * cos.element_size()
        else:
            (cos, sin), (row, position), angles, offset = chunk.rope, (t.data_ptr() for t in chunk.places), n, 0
        reached, sure = array("q", [0, 0]), array("f", [0])
        operator("blocks", self.dtype)(
            address(self.words), address(self.sizes), out.data_ptr(), idx.data_ptr(), self.table, cos.data_ptr() + offset,
            sin.data_ptr() + offset, row, position, gate, address(reached), address(sure), n, chunk.T, chunk.start, first,
            last, len(self.blocks), angles, write_only, leave, expand, c.d_ref, c.norm_eps, NORM_EPS)
        for mixer, state, projected in records:
            mixer._record_step(state, projected)
        return out, reached[0], bool(reached[1]), sure[0]

    def _place_memory(self, first, last, x, levels, cache, write_only) -> list:
        """
        Writes the words that change; what Mamba states under a checkpoint are to remember of this call. held: the memory
        whose places are written, per block.
        """
        words, held, records, head_dim = self.words, self.held, [], self.config.head_dim
        for i in range(first, last):  # before anything changes
            if words[i * WORDS] and cache.views[i].state._record is not None:
                cache.views[i].state._check_room(x.size(1))
        for i in range(first, last):
            at, view, level = i * WORDS, cache.views[i], levels[i]
            words[at + LEVEL] = level
            if not words[at]:  # attention
                view.mark(level // head_dim)
                k, v = view.k, view.v
                if held[i][0] is not k or held[i][1] is not v:
                    held[i] = k, v
                    words[at + KEYS:at + KEYS + 2] = array("q", (k.data_ptr(), v.data_ptr()))
                    self.sizes[6:9] = array("q", (k.stride(0), k.stride(1), k.size(2)))
                words[at + HEADS] = 0 if view.heads is None else view.heads.data_ptr()
                continue
            state, place = view.state, 0
            if state._record is None and held[i][0] is state.conv_state and held[i][1] is state.ssm_state:
                continue
            conv, ssm = state._go_on()
            held[i] = (None, None) if state._record is not None else (conv, ssm)
            if state._record is not None:
                mixer = self.blocks[i].mamba
                projected = x.new_empty(*x.shape[:2], mixer.in_proj.out_features - (mixer.d_inner if write_only else 0))
                records.append((mixer, state, projected))
                place = projected.data_ptr()
            words[at + PROJECTED:at + WORDS] = array("q", (
                place, conv.data_ptr(), state.conv_state.data_ptr(), ssm.data_ptr(), state.ssm_state.data_ptr()))
            self.sizes[14:] = array("q", (conv.stride(0), ssm.stride(0)))
        return records


def _some(tokens: array, first: int, last: int) -> torch.Tensor:
    """Tokens first, ..., last - 1 of them, (1, n) int64; no copy."""
    return torch.frombuffer(tokens, dtype=torch.long, count=last - first, offset=first * tokens.itemsize)[None]
