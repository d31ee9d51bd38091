"""int8 and nf4 by bitsandbytes: what stays dense, how a model is held, what keeps it differentiable."""

from __future__ import annotations

import logging
import re
import warnings
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from compose.base.compatibility import BaseWarning
from compose.base.request import BaseRequest
from compose.base.sites import output_embeddings
from hub.errors import GateError


def bitsandbytes_config(auto: Any, config: Any, request: BaseRequest) -> Any:
    """What transformers needs to load a model of class ``auto`` as int8 or nf4 (see ``compose.base.request``)."""
    hush_missing_kernel()
    compute = request.torch_dtype or getattr(config, "dtype", None) or torch.float32
    skip = stays_dense(auto, config, request.trust_remote_code)
    if request.quantize == "int8":
        _say_once("bitsandbytes.autograd._functions")  # it warns of its cast to fp16 in every layer of every forward
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=request.double_quant,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=skip,
    )


def stays_dense(auto: Any, config: Any, trust_remote_code: bool) -> list[str]:
    """Modules that stay dense: the output embeddings, and whatever stands outside the backbone or pools it."""
    with torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=trust_remote_code)
    prefix, output = model.base_model_prefix, output_embeddings(model)
    heads = {path for path, module in model.named_modules() if output is not None and module is output}
    heads |= {path for path, _ in model.named_modules() if path.rsplit(".", 1)[-1] == "pooler"}
    if hasattr(model, prefix):
        heads |= {name for name, _ in model.named_children() if name != prefix}
    return sorted(heads)


def quantization_of(model: nn.Module) -> str:
    """How a model's linear layers are held: ``none``, ``int8`` or ``nf4`` (``fp4`` and others by their name)."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return "none"
    if getattr(config, "load_in_8bit", False):
        return "int8"
    if getattr(config, "load_in_4bit", False):
        return str(config.bnb_4bit_quant_type)
    return str(getattr(config, "quant_method", "other"))


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that bitsandbytes holds in 4 or 8 bits, by path."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return {path: m for path, m in model.named_modules() if isinstance(m, Linear4bit | Linear8bitLt)}


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for its bf16 inference kernel on CPUs with AVX512-BF16.

    The kernel has no backward pass, so a gradient through a repacked layer is silently lost; and what reads the codes
    (norms, merges, fingerprints) does not know the packed order.

    Raises
    ------
    GateError
        A model that was run in eval mode before it came here is repacked already; that rounds scales for good.
    """
    if quantization_of(model) == "none":
        return
    from bitsandbytes.nn import Linear4bit

    for path, layer in quantized_layers(model).items():
        if not isinstance(layer, Linear4bit):
            continue
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise GateError(
                f"bitsandbytes has repacked {path} of this {type(model).__name__} for bf16 inference, and rounded it",
                hint="give the directory or the id of the model, or the model before its first forward",
            )
        layer.support_avx512bf16_for_cpu = False


def bits_per_parameter(model: nn.Module) -> float:
    """Stored bits per parameter of the quantized layers: codes, absmax and, with double quantization, its own."""
    bits = parameters = 0
    for layer in quantized_layers(model).values():
        weight = cast("Any", layer.weight)
        state = getattr(weight, "quant_state", None)
        if state is None:  # int8: one byte each and a float32 scale a row
            parameters += weight.numel()
            bits += 8 * weight.numel() + 32 * weight.shape[0]
            continue
        parameters += state.shape.numel()
        scales = [state.absmax] + ([state.state2.absmax, state.offset] if state.nested else [])
        bits += 8 * sum(t.numel() * t.element_size() for t in (weight.data, *scales))
    return bits / parameters if parameters else 0.0


def warn_of_dense_weights(model: nn.Module, quantize: str) -> None:
    """Say which weights inside the blocks were left as they were, and what share of all parameters that is.

    bitsandbytes replaces plain linear layers: subclasses of nn.Linear, T5's wo and experts that a layer holds in one
    tensor for all (most of a mixture of experts) stay dense.
    """
    done = quantized_layers(model)
    total = sum(_count(module) for module in done.values())
    total += sum(p.numel() for path, p in model.named_parameters() if path.rpartition(".")[0] not in done)
    dense: dict[str, int] = {}  # parameters, by where they are
    dtypes: dict[torch.dtype, None] = {}
    for path, module in model.named_modules():
        if path in done or not re.search(r"\.\d+\.", path):
            continue
        linear = isinstance(module, nn.Linear | Conv1D)
        for name, weight in module.named_parameters(recurse=False):
            # Gains, biases, gates of experts and short convolutions are no weights that a quantization is about.
            if weight.dim() >= 2 and (linear or weight.numel() > total / 1000):
                where = re.sub(r"[.][0-9]+(?=[.])", ".*", path if linear else f"{path}.{name}")
                place = f"{where} ({type(module).__name__})"
                dense[place] = dense.get(place, 0) + weight.numel()
                dtypes[weight.dtype] = None
    if not dense:
        return
    largest = sorted(dense, key=lambda place: -dense[place])
    kinds = ", ".join(f"{place}, {dense[place] / total:.1%}" for place in largest[:6])
    warnings.warn(
        f"{quantize} of {type(model).__name__} quantizes {len(done)} linear layers and leaves "
        f"{sum(dense.values()) / total:.1%} of all parameters, inside the blocks, in "
        f"{' and '.join(map(str, dtypes))}: {kinds}" + (f" and {len(dense) - 6} more" if len(dense) > 6 else ""),
        BaseWarning,
        stacklevel=4,
    )


def _count(layer: nn.Module) -> int:
    """How many numbers a quantized layer stands for, its bias included."""
    weight, bias = cast("Any", layer.weight), cast("Any", getattr(layer, "bias", None))
    state = getattr(weight, "quant_state", None)
    return int(weight.numel() if state is None else state.shape.numel()) + (0 if bias is None else bias.numel())


class _Once(logging.Filter):
    """Lets each message template of a logger through once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        fresh = record.msg not in self.seen
        self.seen.add(str(record.msg))
        return fresh


def _say_once(name: str) -> None:
    logger = logging.getLogger(name)
    if not any(isinstance(known, _Once) for known in logger.filters):
        logger.addFilter(_Once())


def hush_missing_kernel() -> None:
    """Keep bitsandbytes from asking for a kernel that :func:`keep_differentiable` keeps it from using."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_asks_for_no_kernel)


def _asks_for_no_kernel(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit")
