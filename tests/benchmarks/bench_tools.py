"""What the benchmarks share: calls timed in turn, ratios of medians, and a line about the machine."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch


def interleave(calls: Mapping[str, Callable[[], Any]], rounds: int, *, warm: int = 2) -> dict[str, list[float]]:
    """Seconds of each call in each of ``rounds`` rounds, one after the other within a round, after ``warm`` unmeasured ones."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for turn in range(warm + rounds):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if turn >= warm:
                    times[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return times


def ratio(times: list[float], base: list[float]) -> float:
    """Median over rounds of this call's time to the base's in the same round: what slows a whole round cancels."""
    return median(t / b for t, b in zip(times, base, strict=True))


def machine() -> str:
    """Processor, threads, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else name
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"
