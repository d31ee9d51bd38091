"""What the benchmarks share: models, calls timed in turn, ratios of medians, tables, a line about the machine."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def interleave(calls: Mapping[str, Callable[[], Any]], rounds: int, *, warm: int = 2) -> dict[str, list[float]]:
    """Seconds of each call in each of ``rounds`` rounds, in turn within a round, after ``warm`` rounds unmeasured."""
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


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Median over rounds of this call's time to the base's in the same round: what slows a whole round cancels."""
    return median(t / b for t, b in zip(times, base, strict=True))


def shape_options(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """The options of a measurement: the shape of model and batch, rounds, threads, and the JSON report."""
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's own)")
    parser.add_argument("--json", metavar="FILE|-", help="write the report as JSON, - for stdout")


def llama(options: argparse.Namespace) -> LlamaForCausalLM:
    """A random Llama of the options' width, layers and vocabulary, frozen."""
    heads = max(1, options.width // 64)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=int(options.width * 2.6875),
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=8 * options.prompt,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def resident(field: str, *, reset: bool = False) -> int:
    """VmRSS (now) or VmHWM (the largest since the last reset), in bytes (Linux).

    A reset gives what the allocator keeps free back to the system first, or what is used again would not count.
    """
    if reset:
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def machine() -> str:
    """Processor (or GPU), threads, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else next(names, platform.processor())
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def report(found: Mapping[str, Any], columns: Sequence[str], target: str | None, stream: TextIO) -> None:
    """Print the table, and write everything as JSON where asked; with ``-`` that takes stdout and the table stderr."""
    if target == "-":
        stream = sys.stderr
        print(json.dumps(found, indent=2))
    elif target:
        Path(target).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"{found['machine']}\n{found['model']}", file=stream)
    print("  ".join(f"{name:>12}" for name in columns), file=stream)
    for row in found["rows"]:
        cells = (f"{row[c]:.3f}" if isinstance(row[c], float) else str(row[c]) for c in columns)
        print("  ".join(f"{cell:>12}" for cell in cells), file=stream)
