"""
What the stages of nanochat-d32's hybrid take, for scripts/plan.py: parameters, compute by mode, memory that stays, and the
cost of training, all computed from the model on the meta device.
"""
from dataclasses import asdict
from typing import NamedTuple

import torch

from nanochat.elastic_step import DEFAULT_RECIPE, ElasticStep
from nanochat.hybrid_gpt import HybridConfig, HybridGPT
from nanochat.monitor import PEAK_FLOPS
from nanochat.optim import state_bytes
from nanochat.stages import frozen_boxes, set_trained, trained_entries
from nanochat.step_estimate import Workload

WIDTHS = {1: 2048, 2: 2560, 3: 4096}
FIRST_PLAN = {1: (40, 1000), 2: (50, 1200), 3: (100, 2400)}  # hours on 8 H100s, dollars: the project's first estimate


class Stage(NamedTuple):
    """
    A stage's model on the meta device, as it is trained; boxes: see stages.frozen_boxes; old: the config that it was
    grown from, None for stage 1.
    """
    number: int
    model: HybridGPT
    boxes: dict | None
    old: HybridConfig | None = None

    @property
    def phase(self) -> str:
        return f"stage {self.number}"

    @property
    def workload(self) -> Workload:
        """A training step with fractal_train's default recipe."""
        return Workload(self.model.config, self.phase, self.old, recipe=DEFAULT_RECIPE)


def make_stage(number: int, config: HybridConfig, old: HybridConfig | None = None) -> Stage:
    """Stage 1 of `config`, or stage 2 or 3 of one grown from `old`."""
    with torch.device("meta"):
        model = HybridGPT(config)
    boxes = None if old is None else frozen_boxes(config, {"surgery": "grow", "old_config": asdict(old)})
    set_trained(model, f"stage {number}", boxes=boxes)
    return Stage(number, model, boxes, old)


def d32_stages() -> list[Stage]:
    configs = {number: HybridConfig.preset("d32", width) for number, width in WIDTHS.items()}
    return [make_stage(number, config, configs.get(number - 1)) for number, config in configs.items()]


def parameters(stage: Stage) -> dict[str, int]:
    """Counts by part, and how many entries are trained."""
    return stage.model.num_params() | {"trained": trained_entries(stage.model, stage.boxes)}


def modes(stage: Stage, context: int) -> dict[str, dict[str, float]]:
    """Mode -> FLOPs of one token behind `context` others, its share of full compute, and that of the part that shrinks."""
    full = stage.model.cost(context=context)
    out = {}
    for mode in stage.model.config.modes:
        cost = stage.model.cost(mode, context)
        flops = sum(c.flops for c in cost.values())
        out[mode] = {"width": stage.model.config.modes[mode], "flops": flops, "dynamic": cost["dynamic"].flops,
                     "share": flops / sum(c.flops for c in full.values()),
                     "dynamic_share": cost["dynamic"].flops / full["dynamic"].flops}
    return out


def memory(stage: Stage) -> dict[str, int]:
    """Bytes of all ranks together that training holds all the time, and of the weights alone in bf16, for inference."""
    optimizer, if_all_trained = state_bytes(stage.model)
    total = sum(p.numel() for p in stage.model.parameters())
    return {"weights_bf16": 2 * total, "masters": 4 * total,
            "gradients": sum(4 * p.numel() for p in stage.model.parameters() if p.requires_grad),
            "optimizer": optimizer, "optimizer_if_all_trained": if_all_trained}


def disk(stages: list[Stage]) -> float:
    """
    Bytes that the seed workflow (dev/speedrun_d32.sh) takes at most, which is in the last stage: the base and some data;
    of each stage the hybrid as surgery writes it (grown ones in bf16), the fp32 export and, of those before, the optimizer's
    state beside it; three checkpoints of the last: two are kept, lest a damaged one be the only one, while one is written.
    """
    *before, last = map(memory, stages)
    kept = 10e9 + sum((6 if s.boxes else 8) * sum(p.numel() for p in s.model.parameters()) for s in stages)
    return kept + sum(m["optimizer"] for m in before) + 3 * (last["masters"] + last["optimizer"])


def step_flops(model: HybridGPT) -> dict[str, float]:
    """FLOPs per token of a training step with fractal_train's default recipe, by part; see ElasticStep.flops_per_token."""
    return ElasticStep(model, seed=0, steps=1, recipe=DEFAULT_RECIPE).flops_per_token()


def training(stage: Stage, args) -> dict[str, float]:
    """Speed, and what so many tokens cost; what the first plan's hours and dollars buy."""
    flops = step_flops(stage.model)
    per_gpu_hour = PEAK_FLOPS[args.gpu] * args.mfu * 3600 / sum(flops.values())
    tokens = args.tokens or args.tokens_per_param * parameters(stage)["trained"]
    hours, dollars = FIRST_PLAN[stage.number]
    gpu_hours = tokens / per_gpu_hour
    return {"flops_per_token": sum(flops.values()), **{f"{k}_flops": v for k, v in flops.items()},
            "tokens_per_hour": per_gpu_hour * args.gpus, "tokens": tokens, "hours": gpu_hours / args.gpus,
            "dollars": gpu_hours * args.price, "first_hours": hours, "first_dollars": dollars,
            "tokens_in_first_hours": hours * args.gpus * per_gpu_hour,
            "tokens_for_first_dollars": dollars / args.price * per_gpu_hour}


def show(title: str, head: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}")
    sizes = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        print("  " + "  ".join(cell.rjust(n) for cell, n in zip(row, sizes)))


def show_tables(stages: list[Stage], args) -> dict:
    result = {}
    for s in stages:
        result[s.phase] = {"width": s.model.config.n_embd, "parameters": parameters(s), "modes": modes(s, args.context),
                           "memory": memory(s), "training": training(s, args)}
    show("parameters, billions",
         ["stage", "width", "total", "base", "Mamba blocks", "value embeddings", "controls", "trained"],
         [[k, str(r["width"])] + [f"{r['parameters'][p] / 1e9:.4f}" for p in
                                  ("total", "base", "mamba", "value_embeds", "control", "trained")]
          for k, r in result.items()])
    show(f"compute of one token behind {args.context} others",
         ["stage", "mode", "width", "GFLOP", "of the whole model", "of attention + MLP"],
         [[k, mode, str(m["width"]), f"{m['flops'] / 1e9:.2f}", f"{m['share']:.1%}", f"{m['dynamic_share']:.2%}"]
          for k, r in result.items() for mode, m in r["modes"].items()])
    gb = {k: {name: v / 1e9 for name, v in r["memory"].items()} for k, r in result.items()}
    show(f"memory that stays, GB: all together, and per GPU of {args.gpus} (`--memory` traces what a step takes on top)",
         ["stage", "bf16 weights", "fp32 masters", "gradients", "optimizer", "(all trained)", "stage saves", "per GPU"],
         [[k, f"{m['weights_bf16']:.1f}", f"{m['masters']:.1f}", f"{m['gradients']:.1f}", f"{m['optimizer']:.1f}",
           f"{m['optimizer_if_all_trained']:.1f}", f"{1 - m['optimizer'] / m['optimizer_if_all_trained']:.0%}",
           f"{(m['masters'] + m['gradients'] + m['optimizer']) / args.gpus:.1f}"] for k, m in gb.items()])
    parts = "full", "exits", "teacher", "narrow"
    show(f"training on {args.gpus} x {args.gpu} at {args.mfu:.0%} MFU and ${args.price:g} per GPU hour",
         ["stage", "GFLOP per token", *(f"({p})" for p in parts), "M tokens/h", "B tokens", "hours", "dollars"],
         [[k, f"{t['flops_per_token'] / 1e9:.1f}", *(f"{t[p + '_flops'] / 1e9:.2f}" for p in parts),
           f"{t['tokens_per_hour'] / 1e6:.0f}", f"{t['tokens'] / 1e9:.1f}", f"{t['hours']:,.0f}", f"{t['dollars']:,.0f}"]
          for k, t in ((k, r["training"]) for k, r in result.items())])
    show("the first plan, and what it buys there",
         ["stage", "hours", "B tokens in these", "dollars", "B tokens for these", "tokens per trained parameter"],
         [[k, str(t["first_hours"]), f"{t['tokens_in_first_hours'] / 1e9:.2f}", f"{t['first_dollars']:,}",
           f"{t['tokens_for_first_dollars'] / 1e9:.2f}", f"{t['tokens_in_first_hours'] / r['parameters']['trained']:.2f}"]
          for k, r in result.items() for t in (r["training"],)])
    return result
