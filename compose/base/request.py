"""What is asked of a base: task, labels, dtype, device, quantization. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

from hub.errors import UsageError, suggest

if TYPE_CHECKING:
    import torch

Quantization: TypeAlias = Literal["none", "int8", "nf4"]

# Each name, and how linear weights are then held; `compose.base.quantization` carries it out.
QUANTIZATIONS: Mapping[Quantization, str] = {
    "none": "as the checkpoint has them",
    "int8": "8 bits and one scale a row, outliers apart (LLM.int8(), arXiv:2208.07339)",
    "nf4": "4 bits and one absmax a block of 64 (QLoRA, arXiv:2305.14314)",
}
TASKS: Mapping[str, str] = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "regression": "AutoModelForSequenceClassification",
}
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_DTYPES |= {name: name for name in _DTYPES.values()}


@dataclass(frozen=True)
class BaseRequest:
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
        if not isinstance(self.dtype, str):
            return self.dtype
        import torch

        return cast("torch.dtype", getattr(torch, _DTYPES[self.dtype]))

    @property
    def torch_device(self) -> torch.device:
        """The device asked for, else this process's CUDA device, else the CPU."""
        import torch

        if self.device is not None:
            return torch.device(self.device)
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # set by torchrun and accelerate
        return torch.device("cpu")


def _one_of(what: str, value: str | None, known: Iterable[str]) -> None:
    if value is not None and value not in known:
        near = suggest(value, known)
        raise UsageError(
            f"{what} {value!r} is not known" + (f"; {near}" if near else ""), hint=f"{what}: " + ", ".join(known)
        )
