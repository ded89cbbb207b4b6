"""Configuration of Adamba, an elastic language model: nanochat's attention blocks, Mamba-2 blocks, nested widths."""
from transformers import PretrainedConfig


class AdambaConfig(PretrainedConfig):
    """
    Two fields say how much compute is used; they may be given to `from_pretrained` or set on `model.config`:

        mode: a name in `modes` (ghost, whisper, normal, think, god), a width among their values, or None for full width.
        exit_depth: after how many blocks every token exits, or None for all blocks.

    n_layer counts attention blocks; with `hybrid`, each is followed by a Mamba-2 block. top_width is the width of attention
    and MLP matrices (n_embd, or less in an extracted model); the norm divides by d_ref at every width. The fields from
    rope_base on are those in which nanochat's vintages differ: windows and x0_lambdas have an entry per attention block;
    value_embeds says whether the base has some (a hybrid always has).
    `adamba` holds what else is known of the model: its tag, provenance, proof and calibration.
    """
    model_type = "adamba"
    attribute_map = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
                     "num_key_value_heads": "n_kv_head", "max_position_embeddings": "sequence_len"}
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    def __init__(self, sequence_len=2048, vocab_size=65536, n_layer=32, n_head=16, n_kv_head=16, n_embd=2048, hybrid=True,
                 d_ref=None, top_width=None, modes=None, mode=None, exit_depth=None, mamba_expand=3, mamba_headdim=64,
                 mamba_d_state=128, mamba_d_conv=4, mamba_group_width=768, norm_eps=2.0 ** -23, rope_base=10000.0,
                 softcap=15.0, qk_scale=1.0, windows=(), x0_lambdas=(), smear_gate=(), smear_lambda=0.0, backout_lambda=0.0,
                 value_embeds=False, use_cache=True, adamba=None, **kwargs):
        self.sequence_len, self.vocab_size = sequence_len, vocab_size
        self.n_layer, self.n_head, self.n_kv_head, self.n_embd, self.hybrid = n_layer, n_head, n_kv_head, n_embd, hybrid
        self.d_ref, self.top_width = d_ref or n_embd, top_width or n_embd
        self.modes = dict(modes or {"god": self.top_width})
        self.mode, self.exit_depth = mode, exit_depth
        self.mamba_expand, self.mamba_headdim, self.mamba_d_state = mamba_expand, mamba_headdim, mamba_d_state
        self.mamba_d_conv, self.mamba_group_width = mamba_d_conv, mamba_group_width
        self.norm_eps, self.rope_base, self.softcap, self.qk_scale = norm_eps, rope_base, softcap, qk_scale
        self.windows, self.x0_lambdas, self.smear_gate = list(windows), list(x0_lambdas), list(smear_gate)
        self.smear_lambda, self.backout_lambda = smear_lambda, backout_lambda
        self.value_embeds, self.use_cache, self.adamba = value_embeds, use_cache, dict(adamba or {})
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def n_block(self):
        return self.n_layer * (2 if self.hybrid else 1)

    def level(self):
        """The width that `mode` stands for. ValueError that lists the modes."""
        if self.mode is None:
            return self.top_width
        if self.mode in self.modes:
            return self.modes[self.mode]
        if str(self.mode).isdigit() and int(self.mode) in self.modes.values():
            return int(self.mode)
        if self.mode == "auto":
            raise ValueError("mode 'auto' decides token by token, which only the Adamba package does: load this repository "
                             f"there, or choose one of {', '.join(self.modes)}")
        raise ValueError(f"unknown mode {self.mode!r}: choose one of {', '.join(self.modes)}, or a width among "
                         f"{', '.join(map(str, sorted(set(self.modes.values()))))}")

    def depth(self):
        """After how many blocks tokens exit. ValueError out of range."""
        depth = self.n_block if self.exit_depth is None else self.exit_depth
        if not 1 <= depth <= self.n_block:
            raise ValueError(f"exit_depth {depth} is out of range: this model has {self.n_block} blocks")
        return depth
