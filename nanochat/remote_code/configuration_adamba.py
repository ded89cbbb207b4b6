"""Configuration of Adamba: a GPT with a Mamba-2 block behind each attention block, and nested widths."""
try:
    from transformers import PreTrainedConfig
except ImportError:  # transformers 4
    from transformers import PretrainedConfig as PreTrainedConfig


class AdambaConfig(PreTrainedConfig):
    """
    The sizes of the trained model, and two choices of how much of it runs, which from_pretrained takes as arguments too:
    mode: 'ghost', 'whisper', 'normal', 'think', 'god' (the full width; the default), or a width in dims as a number:
    attention and MLP use the leading dims, heads and hidden units alone.
    exit_depth: after how many blocks every token exits (None: it runs through all).
    """
    model_type = "adamba"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head",
                     "num_hidden_layers": "n_block", "max_position_embeddings": "sequence_len"}

    def __init__(self, vocab_size=65536, sequence_len=2048, n_layer=32, n_head=16, n_kv_head=16, n_embd=2048, d_ref=2048,
                 top_width=2048, mamba_expand=3, mamba_headdim=64, mamba_d_state=128, mamba_d_conv=4, mamba_group_width=768,
                 rope_base=10000.0, softcap=15.0, mode="god", exit_depth=None, **kwargs):
        self.vocab_size, self.sequence_len, self.n_layer = vocab_size, sequence_len, n_layer
        self.n_head, self.n_kv_head, self.n_embd = n_head, n_kv_head, n_embd
        self.d_ref, self.top_width = d_ref, top_width
        self.mamba_expand, self.mamba_headdim, self.mamba_d_state = mamba_expand, mamba_headdim, mamba_d_state
        self.mamba_d_conv, self.mamba_group_width = mamba_d_conv, mamba_group_width
        self.rope_base, self.softcap = rope_base, softcap
        self.mode, self.exit_depth = mode, exit_depth
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def n_block(self):
        return 2 * self.n_layer

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def modes(self):
        """Mode -> width."""
        def whole_heads(d):
            return max(self.head_dim, d // self.head_dim * self.head_dim)
        modes = {"ghost": self.head_dim, "whisper": whole_heads(self.d_ref // 4), "normal": whole_heads(self.d_ref // 2),
                 "think": self.d_ref}
        return {name: d for name, d in modes.items() if d <= self.top_width} | {"god": self.top_width}

    @property
    def width(self):
        """The width of the chosen mode, in dims. Raises ValueError for a mode or width that the model does not have."""
        modes, mode = self.modes, self.mode
        if str(mode).isdigit() and int(mode) in modes.values():
            return int(mode)
        if mode not in modes:
            raise ValueError(f"unknown mode {mode!r}: choose one of {', '.join(modes)} or a width among "
                             f"{', '.join(map(str, sorted(set(modes.values()))))}")
        return modes[mode]

    @property
    def depth(self):
        """After how many blocks every token exits. Raises ValueError for a number that is none of blocks."""
        depth = self.n_block if self.exit_depth is None else self.exit_depth
        if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= self.n_block:
            raise ValueError(f"exit_depth is {depth!r}: give a number of blocks from 1 to {self.n_block}, or None for all")
        return depth
