"""Speed of the Mamba-2 mixer, for scripts/bench.py mamba."""
import statistics

import torch

from nanochat.common import autodetect_device_type, get_compute_dtype
from nanochat.mamba_block import FP32_PARAMS, Mamba2
from scripts.bench_tools import machine, median_ratio, paired_medians, paired_times


def transformers_mixer(m: Mamba2):
    """The transformers library's mixer with m's weights; its reference PyTorch path on a machine without kernels."""
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer
    config = Mamba2Config(hidden_size=m.d_model, expand=m.d_inner // m.d_model, head_dim=m.headdim, num_heads=m.nheads,
                          n_groups=m.ngroups, state_size=m.d_state, conv_kernel=m.d_conv, num_hidden_layers=1,
                          layer_norm_epsilon=1e-5)
    mixer = Mamba2Mixer(config, 0)
    mixer.load_state_dict(m.state_dict())
    return mixer


def mixer(d_model: int, device_type: str = "cpu", **kwargs) -> Mamba2:
    torch.manual_seed(0)
    m = Mamba2(d_model, **kwargs)
    m.init_weights()
    return m.to(device_type)


def step(module, u):
    """One forward and backward; gradients are dropped outside the timing of the next."""
    def run():
        module.zero_grad(set_to_none=True)
        y = module(u)
        y.backward(torch.ones_like(y))
    return run


def forward(module, u):
    def run():
        with torch.no_grad():
            module(u)
    return run


def bench_against_transformers(rounds):
    """Forward + backward of the whole mixer, B4 T2048 D512 expand 2, one group, per dtype."""
    ours = mixer(512, backend="torch")
    out = {}
    for dtype in (torch.float32, torch.bfloat16):
        theirs = transformers_mixer(ours).to(dtype)
        u = torch.randn(4, 2048, 512).to(dtype).requires_grad_()
        times = paired_times({"ours": step(ours, u), "transformers": step(theirs, u), "ours forward": forward(ours, u),
                              "transformers forward": forward(theirs, u)}, rounds)
        name = str(dtype).removeprefix("torch.")
        out[name] = {"ms": {k: 1e3 * statistics.median(t) for k, t in times.items()},
                     "speedup": median_ratio(times, "transformers", "ours"),
                     "speedup_forward": median_ratio(times, "transformers forward", "ours forward")}
        print(f"{name}: forward+backward {out[name]['ms']['ours']:.0f} ms, transformers "
              f"{out[name]['ms']['transformers']:.0f} ms: {out[name]['speedup']:.2f}x; forward alone "
              f"{out[name]['speedup_forward']:.2f}x", flush=True)
    return out


def bench_linear_in_time(rounds, dtype):
    """Time per token, forward + backward, of one row of 16,384 tokens over that of one of 2,048; D512, one group."""
    m = mixer(512, backend="torch")
    rows = {T: torch.randn(1, T, 512).to(dtype).requires_grad_() for T in (2048, 16384)}
    times = paired_times({T: step(m, u) for T, u in rows.items()}, rounds)
    ratio = median_ratio(times, 16384, 2048) / 8
    print(f"time per token at T=16,384 over T=2,048 ({dtype}): {ratio:.3f}", flush=True)
    return {"ratio": ratio, "us_per_token": {T: 1e6 * statistics.median(t) / T for T, t in times.items()}}


@torch.no_grad()
def bench_decode(rounds, dtype, **sizes):
    """One decoded token against one reading of the same weights (a sum over them, as fp32 words)."""
    m = mixer(backend="torch", **sizes)
    for name, p in m.named_parameters():
        p.data = p.data if name in FP32_PARAMS else p.data.to(dtype)
    words = [p.data.view(-1).view(torch.float32) for p in m.parameters() if p.numel() % 2 == 0]
    size = sum(w.nbytes for w in words)
    state = m.new_state(1, "cpu", dtype)
    u = torch.randn(1, 1, m.d_model).to(dtype)
    times = paired_times({"decode": lambda: m(u, state), "write": lambda: m(u, state, write_only=True),
                          "read": lambda: [w.sum() for w in words]}, rounds, warmup=3)
    median = {k: statistics.median(t) for k, t in times.items()}
    ratio = median_ratio(times, "decode", "read")
    print(f"decode D{m.d_model} ({dtype}): {1e3 * median['decode']:.2f} ms, its {size / 1e6:.1f} MB are read in "
          f"{1e3 * median['read']:.2f} ms ({size / median['read'] / 1e9:.1f} GB/s): {ratio:.2f}x; memory write alone "
          f"{1e3 * median['write']:.2f} ms", flush=True)
    return {"ratio": ratio, "ms": {k: 1e3 * v for k, v in median.items()}, "weight_bytes": size}


def bench_gpu(rounds):
    """A training step of one stage-1 block's mixer (D 2048, T 2048, B 8, bf16): the kernel form and the PyTorch form."""
    u = torch.randn(8, 2048, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    forms = {b: mixer(2048, "cuda", expand=3, ngroups=8, backend=b) for b in ("cuda", "torch")}
    times = paired_medians({k: step(torch.compile(m, fullgraph=True), u) for k, m in forms.items()}, rounds,
                           warmup=3, device_type="cuda")
    flops = 3 * sum(forms["cuda"].flops_per_token().values()) * u.size(0) * u.size(1)  # backward: twice the forward
    for k, t in times.items():
        print(f"{k} form: {1e3 * t:.2f} ms a step, {flops / t / 1e12:.0f} TFLOP/s", flush=True)
    return {k: {"ms": 1e3 * t, "tflops": flops / t / 1e12} for k, t in times.items()}


def bench_mamba(args) -> dict:
    device_type = autodetect_device_type()
    dtype = get_compute_dtype("cpu")
    result = {"machine": machine(device_type)}
    if "train" in args.parts:
        result["training"] = bench_against_transformers(args.rounds)
        name = str(dtype).removeprefix("torch.")
        result["speedup_vs_transformers"] = result["training"][name]["speedup"]
        result["speedup_dtype"] = name
    if "length" in args.parts:
        result["length"] = bench_linear_in_time(args.rounds, dtype)
        result["per_token_16k_over_2k"] = result["length"]["ratio"]
    if "decode" in args.parts:
        stage1 = {"d_model": 2048, "expand": 3, "ngroups": 8}
        result["decode"] = {f"{name}_{str(d).removeprefix('torch.')}": bench_decode(10 * args.rounds, d, **sizes)
                            for name, sizes in (("stage1", stage1), ("d512", {"d_model": 512}))
                            for d in dict.fromkeys((dtype, torch.float32))}
        result["decode_over_weight_read"] = result["decode"][f"stage1_{str(dtype).removeprefix('torch.')}"]["ratio"]
    if "gpu" in args.parts and device_type == "cuda":
        result["gpu"] = bench_gpu(args.rounds)
    return result


def add_mamba(parser) -> None:
    parser.add_argument("--rounds", type=int, default=5,
                        help="rounds of the training measurements; of decode, ten times as many")
    parser.add_argument("--parts", nargs="+", choices=["train", "length", "decode", "gpu"],
                        default=["train", "length", "decode", "gpu"], help="what to measure (default: all)")
