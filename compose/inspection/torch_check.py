"""What ``hub doctor`` asks about torch: the device, the processor's features, whether bitsandbytes works here."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from compose.base.quantization import hush_missing_kernel
from hub.project.doctor import Finding

__all__ = ["findings"]


def findings() -> Iterator[Finding]:
    """Device, processor, quantization."""
    yield Finding("machine", "ok", f"torch runs on {_device()}, with {torch.get_num_threads()} CPU threads")
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "DEFAULT":
        yield Finding("machine", "note", "this processor has no AVX2: matrix products are slow", "use another machine")
    else:
        yield Finding("machine", "ok", f"matrix products use {capability}")
    yield _quantization()


def _device() -> str:
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return f"{torch.cuda.get_device_name()} ({free / 2**30:.1f} of {total / 2**30:.1f} GiB free)"
    return "the CPU"


def _quantization() -> Finding:
    """A small weight there and back in nf4, whose steps are at most a sixth of the block's largest value."""
    try:
        found = version("bitsandbytes")
        hush_missing_kernel()
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except (PackageNotFoundError, ImportError, OSError) as error:
        return Finding("machine", "broken", f"bitsandbytes cannot be used: {error}", "pip install bitsandbytes")
    weight = torch.linspace(-1, 1, 4096).reshape(64, 64)
    try:
        codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
        lost = float((dequantize_4bit(codes, state) - weight).abs().max())
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        return Finding("machine", "broken", f"nf4 does not work here: {first}", "use --quantize none")
    if lost > 1 / 3:
        return Finding("machine", "broken", f"nf4 gives wrong numbers here (off by {lost:.2f})", "use --quantize none")
    return Finding("machine", "ok", f"nf4 works (bitsandbytes {found})")
