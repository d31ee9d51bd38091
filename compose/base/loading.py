"""From files to a model: the transformers and bitsandbytes side of ``compose.base.model``."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compose.base.compatibility import BaseWarning
from compose.base.location import weight_files
from hub.contents.tensor_files import read_header
from hub.errors import GateError, UsageError, suggest

TASKS: Mapping[str, str] = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "regression": "AutoModelForSequenceClassification",
}
_SAVED_AS = {  # end of the architecture's name -> task
    "ForMaskedLM": "masked_lm",
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token_classification",
}
QUANTIZATIONS = ("none", "int8", "nf4")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_DTYPES |= {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Request:
    """How a base is to be loaded, checked; the fields are those of :func:`compose.base.model.load_base`."""

    task: str | None = None
    labels: tuple[str, ...] | None = None
    quantize: str = "none"
    double_quant: bool = True
    dtype: str | torch.dtype | None = None
    device: str | torch.device | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _one_of("task", self.task, TASKS)
        _one_of("quantize", self.quantize, QUANTIZATIONS)
        if isinstance(self.dtype, str):
            _one_of("dtype", self.dtype, _DTYPES)
        if self.labels is not None:
            if self.task not in ("classification", "token_classification"):
                raise UsageError("labels go with a classification task", hint='pass task="classification"')
            if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
                raise UsageError(f"labels must be two or more different names, not {list(self.labels)}")

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype asked for, or None."""
        return _DTYPES[self.dtype] if isinstance(self.dtype, str) else self.dtype

    @property
    def torch_device(self) -> torch.device:
        """The device asked for, else this process's CUDA device, else the CPU."""
        if self.device is not None:
            return torch.device(self.device)
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # set by torchrun and accelerate
        return torch.device("cpu")


def _one_of(what: str, value: str | None, known: Any) -> None:
    if value is not None and value not in known:
        near = suggest(value, known)
        raise UsageError(
            f"{what} {value!r} is not known" + (f"; {near}" if near else ""), hint=f"{what}: " + ", ".join(known)
        )


def load_files(directory: Path, request: Request) -> PreTrainedModel:
    """Load the model in ``directory``. Never reads a pickle, never touches the network."""
    files = weight_files(directory)
    for file in files:
        read_header(file.resolve())  # says plainly what is wrong with a broken file
    with quiet():
        config = read_config(directory, request)
        task = request.task or task_of(config)
        auto = getattr(transformers, TASKS[task])
        options: dict[str, Any] = {
            "config": config,
            "dtype": request.torch_dtype or "auto",
            "use_safetensors": True,
            "local_files_only": True,
            "trust_remote_code": request.trust_remote_code,
            "output_loading_info": True,
        }
        if request.attn_implementation is not None:
            options["attn_implementation"] = request.attn_implementation
        if request.quantize != "none":
            options["quantization_config"] = _bitsandbytes(auto, config, request)
            options["device_map"] = {"": request.torch_device}
        try:
            with _seeded():
                model, report = auto.from_pretrained(directory, **options)
        except (ValueError, RuntimeError, OSError, ImportError, KeyError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise GateError(
                f"{directory} cannot be loaded for {task}: {first}",
                path=directory,
                hint=f"saved as {', '.join(config.architectures or ['?'])}; weights in {files[0].name}",
            ) from error
    _check_missing(directory, config, model, report["missing_keys"])
    if request.quantize != "none":
        _tell_what_stays_dense(model, request.quantize)
    return cast("PreTrainedModel", model if request.quantize != "none" else model.to(request.torch_device))


def task_of(config: Any) -> str:
    """The task a checkpoint was saved for: by its architecture's name, ``causal_lm`` where that says nothing."""
    if config.is_encoder_decoder:
        return "seq2seq"
    name = (config.architectures or [""])[0]
    return next((task for end, task in _SAVED_AS.items() if name.endswith(end)), "causal_lm")


def read_config(directory: Path, request: Request) -> Any:
    """Return the transformers config of the model in ``directory``, with the labels and problem type asked for."""
    try:
        config = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=request.trust_remote_code
        )
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise GateError(
            f"{directory}/config.json is not a configuration transformers knows: {str(error).splitlines()[0]}",
            path=directory,
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise GateError(
            f"{directory} holds weights that are quantized already; adapters are made for the unquantized files",
            path=directory,
            hint='give the original model and quantize="nf4" or "int8"',
        )
    if request.labels is not None:
        config.num_labels = len(request.labels)
        config.id2label = dict(enumerate(request.labels))
        config.label2id = {label: i for i, label in enumerate(request.labels)}
    if request.task == "regression":
        config.num_labels, config.problem_type = 1, "regression"
    elif request.task == "classification":
        config.problem_type = getattr(config, "problem_type", None) or "single_label_classification"
    return config


def _check_missing(directory: Path, config: Any, model: nn.Module, missing: Any) -> None:
    names = sorted(missing)
    if not names:
        return
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    if type(model).__name__ in (config.architectures or []) or any(re.search(r"\.\d+\.", name) for name in names):
        raise GateError(
            f"{directory} lacks tensors of {type(model).__name__}: {shown}",
            path=directory,
            hint="the checkpoint is incomplete, or its config.json belongs to another model",
        )
    warnings.warn(
        f"{directory.name} has no {shown}: drawn with seed 0, to be trained with an adapter (modules_to_save)",
        BaseWarning,
        stacklevel=4,
    )


# -- bitsandbytes --------------------------------------------------------------------------------------------------


def _bitsandbytes(auto: Any, config: Any, request: Request) -> Any:
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
    prefix, output = model.base_model_prefix, model.get_output_embeddings()
    heads = {path for path, module in model.named_modules() if output is not None and module is output}
    heads |= {path for path, _ in model.named_modules() if path.rsplit(".", 1)[-1] == "pooler"}
    if hasattr(model, prefix):
        heads |= {name for name, _ in model.named_children() if name != prefix}
    return sorted(heads)


def held_as(model: nn.Module) -> str:
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
    if held_as(model) == "none":
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


def _tell_what_stays_dense(model: nn.Module, quantize: str) -> None:
    """Name the linear layers inside the blocks that were left as they were (T5's wo, subclasses of nn.Linear)."""
    done = quantized_layers(model)
    linear = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and re.search(r"\.\d+\.", p)}
    dense = {path: type(module).__name__ for path, module in linear.items() if path not in done}
    if not dense:
        return
    kinds = sorted({f"{re.sub(r'[.][0-9]+[.]', '.*.', path)} ({kind})" for path, kind in dense.items()})
    warnings.warn(
        f"{quantize} of {type(model).__name__} quantizes {len(done)} linear layers and leaves {len(dense)} "
        f"in {linear[next(iter(dense))].weight.dtype}: {', '.join(kinds[:6])}",
        BaseWarning,
        stacklevel=4,
    )


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


# -- surroundings --------------------------------------------------------------------------------------------------


@contextmanager
def _seeded() -> Iterator[None]:
    """A head the checkpoint lacks is the same at every load, and the caller's random stream stays where it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """No report of what we check ourselves; a progress bar only on a terminal."""
    log = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(min(max(level, logging.ERROR), logging.CRITICAL))
    if not sys.stderr.isatty():
        log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()
