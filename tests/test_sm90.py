"""
Every kernel that the Mamba-2 blocks launch compiles to machine code of an H100 (sm_90), at nanochat-d32's sizes, in bf16.

Triton's compiler and ptxas need no GPU. The launchers run as on a GPU, in a process of its own, with a driver that claims
to be an H100 and with launches that stop after compiling:

    python tests/test_sm90.py          compiles of each autotuned kernel the first configuration that an H100 can launch
    python tests/test_sm90.py all      compiles every configuration
"""
import contextlib
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

SHARED_MEMORY = 232448  # bytes that one block of an H100 can have
OURS = {"_forward_kernel", "_backward_kernel", "_step_kernel"}
UPSTREAM = {"_chunk_cumsum_fwd_kernel", "_chunk_state_fwd_kernel", "_state_passing_fwd_kernel", "_bmm_chunk_fwd_kernel",
            "_chunk_scan_fwd_kernel", "_chunk_scan_bwd_dstates_kernel", "_state_passing_bwd_kernel",
            "_chunk_scan_chunk_state_bwd_dx_kernel", "_bmm_chunk_bwd_kernel", "_chunk_cumsum_bwd_kernel",
            "_selective_scan_update_kernel", "_layer_norm_fwd_1pass_kernel", "_layer_norm_bwd_kernel"}


@pytest.mark.slow
def test_kernels_compile_for_an_h100(tmp_path):
    from test_interpreted_kernels import child_environment, require_kernels
    require_kernels()
    from triton import knobs
    try:
        knobs.nvidia.ptxas  # noqa: B018  (looks for the assembler, and raises where there is none)
    except RuntimeError as e:
        pytest.skip(f"Triton finds no ptxas ({e}): reinstall triton, whose wheels for Linux bring it")
    done = subprocess.run([sys.executable, __file__], cwd=Path(__file__).parent.parent, capture_output=True, text=True,
                          env=child_environment() | {"TRITON_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = json.loads(done.stdout.splitlines()[-1])
    assert all(k["target"] == 90 and k["bytes"] > 1000 for k in compiled)
    assert {k["name"] for k in compiled if k["shared"] <= SHARED_MEMORY} >= OURS | UPSTREAM


class _H100:
    """The part of Triton's driver that compiling needs."""
    utils = types.SimpleNamespace(get_device_properties=lambda _: {
        "max_shared_mem": SHARED_MEMORY, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536})

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compile_only(every: bool) -> list[dict]:
    """Makes launches compile and stop; returns the list that receives a record of each compiled kernel."""
    import torch
    from triton.runtime import autotuner, driver, jit
    compiled, run = [], jit.JITFunction.run

    def compile_kernel(self, *args, grid, warmup=False, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append({"name": self.fn.__name__, "target": kernel.metadata.target.arch, "shared": kernel.metadata.shared,
                         "bytes": len(kernel.asm["cubin"])})

    def compile_configurations(self, *args, **options):
        self.nargs = dict(zip(self.arg_names, args))
        self.best_config = self.configs[0]
        for config in self.configs:  # Triton's tuner, too, passes over those that ask for more shared memory than there is
            self.fn.run(*args, **options, **config.all_kwargs())
            if not every and compiled[-1]["shared"] <= SHARED_MEMORY:
                break
    driver.set_active(_H100())
    jit.JITFunction.run = compile_kernel
    autotuner.Autotuner.run = compile_configurations
    torch.cuda.device = lambda *_: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=132)
    return compiled


def launch_all() -> None:
    """Calls each operator once with the shapes of a stage 1 block of nanochat-d32 and a few tokens."""
    import torch

    from nanochat import mamba_kernels  # noqa: F401  (registers the operators)
    ops, bf16 = torch.ops.adamba, torch.bfloat16
    b, T, H, P, G, N = 1, 512, 96, 64, 8, 128
    d, C = H * P, H * P + 2 * G * N
    x, weight, bias = torch.zeros(b, T, C, dtype=bf16), torch.zeros(C, 4), torch.zeros(C)
    dt, A, D = torch.zeros(b, T, H), torch.zeros(H), torch.zeros(H)
    window, state = torch.zeros(b, 4, C, dtype=bf16), torch.zeros(b, H, P, N)
    ops.cuda_conv(x, weight, bias, window[:, 1:])
    ops.cuda_conv(x, weight, bias, None)
    ops.cuda_conv_backward(x, x, weight, bias, None)
    y, _ = ops.cuda_scan(x, dt, A, D, None, d, G, 256)
    ops.cuda_scan(x, dt, A, D, state, d, G, 256)
    ops.cuda_scan_backward(y, y, x, dt, A, D, None, d, G, 256)
    flat, norm = y.view(b, T, d), torch.zeros(d)
    _, rstd = ops.cuda_norm(flat, flat, norm, d // G)
    ops.cuda_norm_backward(flat, flat, flat, norm, rstd, d // G)
    ops.cuda_step(x[:, 0], dt[:, 0], A, D, weight, bias, window.mT, state, G)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    records = compile_only(every="all" in sys.argv[1:])
    launch_all()
    print(json.dumps(records))
