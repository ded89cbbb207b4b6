"""
HybridGPT: a GPT with a Mamba-2 block behind each of its attention blocks, value embeddings, and nested widths.

Even blocks are attention + MLP, the base's own; odd blocks are Mamba-2 + MLP. Attention and MLP run at any level;
the Mamba mixers, the embedding and the head always run whole: the stable memory. This file knows nothing of files,
devices, ranks or flags.
"""
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn

from nanochat.confidence_probe import ConfidenceGate, LayerDimPredictor, check_thresholds
from nanochat.gpt import GPT, GPTConfig
from nanochat.mamba_block import FP32_PARAMS, Mamba2
from nanochat.matryoshka import MLP, AttentionBlock, add_prefix, norm

CONTROLS = ("gate.", "predictor.")  # the parameters' names of mode auto's two controls begin so


def stays_fp32(name: str) -> bool:
    """Whether a parameter keeps fp32 where the others are cast: the SSM's own and the controls."""
    return (".mamba." in name and name.endswith(FP32_PARAMS)) or name.startswith(CONTROLS)


@dataclass(frozen=True)
class HybridConfig(GPTConfig):
    """
    n_layer counts the base's layers; the hybrid has twice as many blocks. d_ref is the width of the base it was cut
    from. top_width is that of attention, MLP and value embeddings: n_embd, or less in an extracted sub-model.
    mamba_group_width is the width that one group of B, C and of the gated norm serves: growth appends whole groups, so
    that old ones stay as they are. Mode `auto`: a token exits where the gate is surer than exit_threshold, a row expands
    where it is less sure than expand_threshold; the gate learns whether a token's loss at an exit is within exit_tau nats
    of its loss at full depth.
    """
    d_ref: int = 2048
    top_width: int = 2048
    mamba_expand: int = 3
    mamba_headdim: int = 64
    mamba_d_state: int = 128
    mamba_d_conv: int = 4
    mamba_group_width: int = 768
    exit_threshold: float = 0.95
    expand_threshold: float = 0.50
    exit_tau: float = 0.05

    def __post_init__(self):
        super().__post_init__()
        check_thresholds(self.exit_threshold, self.expand_threshold)
        if self.exit_tau < 0:
            raise ValueError(f"exit_tau is {self.exit_tau}; it must be at least 0")
        if self.d_inner % self.mamba_group_width:
            raise ValueError(f"the inner Mamba width {self.d_inner} ({self.mamba_expand} x {self.n_embd}) is no multiple of "
                             f"the group width {self.mamba_group_width}: choose a width or a group width that divides")
        if self.mamba_group_width % self.mamba_headdim:
            raise ValueError(f"the Mamba group width {self.mamba_group_width} is no multiple of its head dim "
                             f"{self.mamba_headdim}")
        for name in ("d_ref", "top_width"):
            if getattr(self, name) > self.n_embd or getattr(self, name) % self.head_dim:
                raise ValueError(f"{name} {getattr(self, name)} must be a whole number of heads and at most the width "
                                 f"{self.n_embd}")

    @property
    def n_block(self) -> int:
        return 2 * self.n_layer

    @property
    def d_inner(self) -> int:
        return self.mamba_expand * self.n_embd

    @classmethod
    def preset(cls, name: str, width: int = 2048) -> "HybridConfig":
        """'d32', nanochat-d32's hybrid, at a stage's width: 2048, 2560 or 4096 (DESIGN 5). ValueError for others."""
        if name != "d32" or width not in (2048, 2560, 4096):
            raise ValueError(f"there is no preset {name} of width {width}: 'd32' has the widths 2048, 2560 and 4096")
        n_head = width // 128
        return cls(n_head=n_head, n_kv_head=n_head, n_embd=width, d_ref=2048, top_width=width)

    @classmethod
    def from_base(cls, base: GPTConfig) -> "HybridConfig":
        """
        The hybrid of a base GPT. For width 2048: SSM heads of 64, 8 groups of 768, state 128 (DESIGN 4). Other bases
        whose heads are multiples of 64 wide, as all of nanochat's: a group for each head, so that growth goes by heads.
        Others take the most groups, up to 8, that whole SSM heads allow. Below 1024 the state is 64.
        """
        d_inner = cls.mamba_expand * base.n_embd
        if base.head_dim % 64 == 0 and base.n_embd != 2048:
            return cls(**asdict(base), d_ref=base.n_embd, top_width=base.n_embd, mamba_headdim=64,
                       mamba_d_state=128 if base.n_embd >= 1024 else 64, mamba_group_width=cls.mamba_expand * base.head_dim)
        for headdim in (64, 32, 16):
            for ngroups in (8, 4, 2, 1):
                if d_inner % (ngroups * headdim) == 0:
                    return cls(**asdict(base), d_ref=base.n_embd, top_width=base.n_embd, mamba_headdim=headdim,
                               mamba_d_state=128 if base.n_embd >= 1024 else 64, mamba_group_width=d_inner // ngroups)
        raise ValueError(f"width {base.n_embd} gives no whole SSM heads: choose a base whose width is a multiple of 16")


class MambaBlock(nn.Module):
    """One residual unit: a Mamba-2 mixer at full width, then an MLP at a level; see AttentionBlock for the arguments."""
    kind = "mamba"

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.d_ref, self.eps = config.d_ref, config.norm_eps
        self.mamba = Mamba2(config.n_embd, d_state=config.mamba_d_state, d_conv=config.mamba_d_conv,
                            expand=config.mamba_expand, headdim=config.mamba_headdim,
                            ngroups=config.d_inner // config.mamba_group_width)
        self.mlp = MLP(config)

    def forward(self, x, level, rope, value=None, cache=None, active=None):
        """x (B, T, D) -> (B, T, D). rope and value are for attention blocks; cache is this block's MambaView."""
        u = norm(x, self.d_ref, self.eps)
        y = self.mamba(u) if cache is None else cache.run(self.mamba, u, write_only=active is False)
        if active is False:
            return x
        x = add_prefix(x, y, active)
        return add_prefix(x, self.mlp(x, level), active)


class HybridGPT(GPT):
    """
    Parameter names: transformer.h.{2i} is the base's layer i, transformer.h.{2i+1}.{mamba,mlp} the Mamba block
    behind it, value_embeds.{2i} the table of attention block 2i (every second one has one, the last always);
    gate and predictor are the controls of mode `auto`.
    """
    def __init__(self, config: HybridConfig):
        super().__init__(config)
        self.gate = ConfidenceGate(config.n_embd, len(config.exit_points))
        self.predictor = LayerDimPredictor(config.n_embd, config.n_block, len(config.levels))
        if not config.value_embeds:  # the base had none, and GPT has made none
            self.value_embeds = self._make_value_embeds()

    def _make_blocks(self, config):
        blocks = []
        for i in range(config.n_layer):
            blocks += [AttentionBlock(config, config.has_value_table(i), config.window_of(i)), MambaBlock(config)]
        return blocks

    @torch.no_grad()
    def init_weights(self):
        """
        GPT's initialisation; mamba-ssm's for the mixers, except that each out_proj is zero like every writer into the
        residual stream; value embeddings zero. So all that a hybrid has beyond its base is an exact no-op at first.
        """
        super().init_weights()
        for block in self.transformer.h:
            if block.kind == "mamba":
                block.mamba.init_weights()
                nn.init.zeros_(block.mamba.out_proj.weight)
        self.gate.init_weights()
        self.predictor.init_weights()

    def num_params(self):
        """Parameters by part: 'base' is what the base GPT of this width would have."""
        mamba = sum(p.numel() for b in self.transformer.h if b.kind == "mamba" for p in b.parameters())
        values = sum(p.numel() for p in self.value_embeds.parameters())
        values += sum(p.numel() for n, p in self.named_parameters() if ".ve_gate." in n)
        control = sum(p.numel() for m in (self.gate, self.predictor) for p in m.parameters())
        total = sum(p.numel() for p in self.parameters())
        return {"base": total - mamba - values - control, "mamba": mamba, "value_embeds": values, "control": control,
                "total": total}
