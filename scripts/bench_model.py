"""
Speeds of the whole model, for scripts/bench.py: a base training step and decoding against the plain loop of
scripts/plain_gpt.py, modes against the bytes they read, random-width training against its FLOPs.
"""
import itertools
import statistics
import time

import torch

from nanochat.cache import MatryoshkaKVCache
from nanochat.checkpoint_manager import build_model
from nanochat.common import get_compute_dtype, has_native_bf16
from nanochat.engine import prepare_inference
from nanochat.gpt import GPTConfig
from nanochat.hybrid_gpt import HybridConfig
from nanochat.loss_eval import PROBED, matryoshka_backward, sample_students
from nanochat.matryoshka import sample_levels
from nanochat.optim import Muon, setup_optimizers
from scripts.bench_stages import bench_sharded, bench_stages
from scripts.bench_tools import machine, median_ratio, paired_times
from scripts.plain_gpt import PlainGPT


def make(config, seed=0):
    """A model whose every weight is non-zero, so that nothing is fast by chance."""
    torch.manual_seed(seed)
    model = build_model(config)
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2 and not p.any():
                p.normal_(std=0.02)
    return model


# --- base ------------------------------------------------------------------------------------------------------------

def bench_base(args) -> dict:
    """A training step of d256 x 8, vocabulary 8192, 8 x 512 tokens, optimizers included, against the plain loop."""
    config = GPTConfig.from_depth(8, 8192, 512, aspect_ratio=32, head_dim=args.head_dim)
    dtype = get_compute_dtype("cpu")
    ours = make(config)
    plain = PlainGPT(config).load(ours)
    ours.compute_dtype = dtype
    optimizers = setup_optimizers(ours)
    theirs = [Muon([p for n, p in plain.named_parameters() if n.startswith("h.")]),
              torch.optim.AdamW([plain.wte.weight, plain.lm_head.weight], lr=1e-3, fused=True)]
    x, y = torch.randint(8192, (2, 8, 512))

    def our_step():
        matryoshka_backward(ours, x, y, [], 1.0)
        for o in optimizers:
            o.step()
        ours.zero_grad(set_to_none=True)

    def plain_step():
        plain(x, y, dtype=dtype).backward()
        for o in theirs:
            o.step()
        plain.zero_grad(set_to_none=True)

    with torch.no_grad():
        apart = abs(float(ours(x, y)[0] - plain(x, y, dtype=dtype)))
    assert apart < 0.02, "the two compute different functions"
    times = paired_times({"ours": our_step, "plain": plain_step}, args.rounds)
    rate = {k: x.numel() / statistics.median(t) for k, t in times.items()}
    ratio = median_ratio(times, "plain", "ours")
    print(f"base training step, {config.n_head} heads of {config.head_dim}, {dtype}: {rate['ours']:,.0f} tok/s, "
          f"plain loop {rate['plain']:,.0f}: {ratio:.2f}x")
    return {"machine": machine("cpu"), "tok_per_s": rate, "vs_plain_loop": ratio}


def add_base(parser) -> None:
    parser.add_argument("--rounds", type=int, default=9, help="paired rounds (default: 9)")
    parser.add_argument("--head-dim", type=int, default=128, help="dims per head (default: 128, as nanochat's)")


# --- decode ----------------------------------------------------------------------------------------------------------

class Decoder:
    """Single decode steps at a full cache of `context` tokens; every call decodes one token for each row."""
    def __init__(self, model, rows: int, context: int, steps: int, mode=None):
        self.model, self.widths = model, model.resolve_widths(mode)
        self.cache = MatryoshkaKVCache(model, rows, context + steps + 8)
        self.idx = torch.randint(model.config.vocab_size, (rows, context))
        self()
        self.idx = self.idx[:, -1:]

    @torch.inference_mode()
    def __call__(self):
        h = self.model.hidden(self.idx, self.widths, cache=self.cache)[:, -1:]
        self.idx = self.model.logits(h)[:, 0].argmax(-1, keepdim=True)


class PlainDecoder:
    def __init__(self, plain, rows: int, context: int, steps: int, dtype):
        self.plain, self.dtype, self.pos = plain, dtype, 0
        c = plain.config
        shape = (rows, c.n_head, context + steps + 8, c.head_dim)
        self.cache = [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(c.n_layer)]
        self.idx = torch.randint(c.vocab_size, (rows, context))
        self()
        self.idx = self.idx[:, -1:]

    @torch.inference_mode()
    def __call__(self):
        logits = self.plain(self.idx, cache=self.cache, pos=self.pos, dtype=self.dtype)
        self.pos += self.idx.size(1)
        self.idx = logits[:, -1].argmax(-1, keepdim=True)


def cast(model, dtype):
    prepare_inference(model, "cpu", dtype)
    return model


def bench_decode(args) -> dict:
    """Decoding at D 1024, 12 attention blocks, vocabulary 32768, context 256."""
    n, context = args.rounds, 256
    config = GPTConfig(2048, 32768, 12, 8, 8, 1024)
    base = make(config)
    plain = PlainGPT(config).load(base)
    cast(base, torch.float32)
    size = sum(c.bytes_read(4, 4) for c in base.cost(context=context).values())
    memory = torch.zeros(int(size // 4))
    times = paired_times({"ours": Decoder(base, 1, context, n), "plain": PlainDecoder(plain, 1, context, n, torch.float32),
                          "read": memory.sum}, n, warmup=3)
    seconds = {k: statistics.median(t) for k, t in times.items()}
    result = {"machine": machine("cpu"), "tok_per_s_fp32": 1 / seconds["ours"],
              "read_gb_per_s": size / seconds["read"] / 1e9, "vs_plain_loop": median_ratio(times, "plain", "ours"),
              "bandwidth_share": median_ratio(times, "read", "ours")}
    print(f"decode fp32, batch 1: {1 / seconds['ours']:.1f} tok/s, {result['vs_plain_loop']:.2f}x the plain loop, "
          f"{result['bandwidth_share']:.0%} of the {result['read_gb_per_s']:.1f} GB/s read bandwidth", flush=True)
    del memory

    batched = paired_times({"one": Decoder(base, 1, context, n), "sixteen": Decoder(base, 16, context, n)}, n, warmup=3)
    result["batch16_over_1"] = 16 * median_ratio(batched, "one", "sixteen")
    print(f"batch 16 decodes {result['batch16_over_1']:.1f}x the tokens/s of batch 1", flush=True)
    if has_native_bf16("cpu"):
        half = cast(make(config), torch.bfloat16)
        times = paired_times({"fp32": Decoder(base, 1, context, n), "bf16": Decoder(half, 1, context, n)}, n, warmup=3)
        result["bf16_speedup"] = median_ratio(times, "fp32", "bf16")
        print(f"bf16 weights: {result['bf16_speedup']:.2f}x fp32", flush=True)
        del half
    del base, plain

    hybrid = cast(make(HybridConfig.from_base(config)), torch.float32)
    modes = ("ghost", "whisper", "normal", "think")
    times = paired_times({m: Decoder(hybrid, 1, context, n, m) for m in modes}, n, warmup=3)
    read = {m: sum(c.bytes_read(4, 4) for c in hybrid.cost(m, context).values()) for m in modes}
    result["mode_ms"] = {m: 1e3 * statistics.median(times[m]) for m in modes}
    result["mode_speedup_over_ideal"] = {}
    for m in modes[:3]:
        speedup, ideal = median_ratio(times, "think", m), read["think"] / read[m]
        result["mode_speedup_over_ideal"][m] = speedup / ideal
        print(f"{m}: {speedup:.2f}x think, {ideal:.2f}x fewer bytes: {speedup / ideal:.2f} of ideal", flush=True)
    tiny = cast(make(HybridConfig.from_base(GPTConfig(2048, 256, 12, 2, 2, 64))), torch.float32)
    step = Decoder(tiny, 1, context, n)
    overhead = statistics.median(paired_times({"tiny": step}, n, warmup=3)["tiny"]) / tiny.config.n_block
    result["overhead_us_per_block_and_token"] = 1e6 * overhead
    print(f"overhead per block and token: {1e6 * overhead:.0f} us (a hybrid of width 64)", flush=True)
    return result


def add_decode(parser) -> None:
    parser.add_argument("--rounds", type=int, default=40, help="decoded tokens per candidate (default: 40)")


# --- train -----------------------------------------------------------------------------------------------------------

def bench_train(args) -> dict:
    """
    Random-level passes of a hybrid d512 x 8+8, 8 x 512 tokens, against full passes and what their FLOPs predict; what the
    gate and the exits add to a training step of a full and a sampled pass; a stage-1 step and a student pass against their
    FLOPs; and the optimizer shared out among two processes.
    """
    model = make(HybridConfig.from_base(GPTConfig.from_depth(8, 8192, 512)))
    dtype = model.compute_dtype = get_compute_dtype("cpu")
    x, y = torch.randint(8192, (2, 8, 512))
    times, flops = {"full": [], "random": []}, {"full": [], "random": []}

    def run(kind, widths):
        start = time.perf_counter()
        loss, _ = model(x, y, widths=widths)
        loss.backward()
        times[kind].append(time.perf_counter() - start)
        flops[kind].append(sum(c.flops for c in model.cost(widths, 256.5).values()))
        model.zero_grad(set_to_none=True)
    run("full", None)
    times["full"].clear(), flops["full"].clear()
    for i in range(args.rounds):
        run("full", None)
        run("random", sample_levels(model.config.levels, model.config.n_block, torch.Generator().manual_seed(i)))
    measured = sum(times["random"]) / sum(times["full"])
    predicted = sum(flops["random"]) / sum(flops["full"])
    print(f"random-level passes take {measured:.2f} of a full pass, FLOPs predict {predicted:.2f}: "
          f"{measured / predicted:.2f}x; full pass {x.numel() / statistics.median(times['full']):,.0f} tok/s ({dtype})")
    starts, at = torch.full((8,), 128), torch.randperm(x.numel())[:8 * PROBED]

    def step(gate_at, exit_at, draws):
        generator = torch.Generator().manual_seed(next(draws))  # the same samples for all
        students = sample_students(model.config, 8, 512, starts, generator)
        matryoshka_backward(model, x, y, students, 1.0, gate_at, exit_at)
        model.zero_grad(set_to_none=True)
    a, b, c = itertools.count(), itertools.count(), itertools.count()
    steps = paired_times({"gate": lambda: step(at, None, a), "exits": lambda: step(None, at, b),
                          "without": lambda: step(None, None, c)}, max(3, args.rounds // 3))
    gate, exits = (median_ratio(steps, k, "without") - 1 for k in ("gate", "exits"))
    print(f"of {len(at)} tokens the gate's shadow loss adds {gate:.1%} to a training step, answers at the exits {exits:.1%}")
    stages = bench_stages(model, max(3, args.rounds // 3))
    return {"machine": machine("cpu"), "stages": stages, "sharded_optimizer": bench_sharded(max(3, args.rounds // 3)),
            "random_level_time_over_flops": measured / predicted, "time_ratio": measured,
            "gate_share_of_step": gate, "exits_share_of_step": exits, "flops_ratio": predicted,
            "full_tok_per_s": x.numel() / statistics.median(times["full"])}


def add_train(parser) -> None:
    parser.add_argument("--rounds", type=int, default=12, help="full and random passes, in turns (default: 12)")
