"""Timing in turns, for the benchmarks of scripts/bench.py."""
import os
import platform
import statistics
import time

import torch


def paired_times(functions: dict, rounds: int, warmup: int = 1, device_type: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each call, functions taken in turns: {name: [one per round]}."""
    times = {name: [] for name in functions}
    for i in range(warmup + rounds):
        for name, f in functions.items():
            if device_type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            f()
            if device_type == "cuda":
                torch.cuda.synchronize()
            if i >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def paired_medians(*args, **kwargs) -> dict[str, float]:
    return {name: statistics.median(t) for name, t in paired_times(*args, **kwargs).items()}


def median_ratio(times: dict[str, list[float]], a: str, b: str) -> float:
    """The median over rounds of a's time / b's time in the same round."""
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))


def machine(device_type: str) -> dict:
    name = torch.cuda.get_device_name() if device_type == "cuda" else platform.processor() or platform.machine()
    return {"torch": torch.__version__, "device": device_type, "device_name": name,
            "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
