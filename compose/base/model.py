"""The frozen base: load it once (dense, int8 or nf4), know which one it is, and refuse adapters of another.

>>> model = load_base("builtin:tiny-lm", quantize="nf4")
>>> identity_of(model).repo
'builtin:tiny-lm'
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from compose.base.compatibility import BaseWarning, Rung, compare
from compose.base.fingerprint import base_tensors, directory_identity, model_identity, tensor_hex16
from compose.base.given import bare_model
from compose.base.loading import load_files, quantized_files
from compose.base.location import BUILTIN, Location, locate
from compose.base.quantization import keep_differentiable, quantization_of
from compose.base.request import BaseRequest
from compose.base.text_config import fact, fill_pad_id
from hub.errors import GateError, HubError, UsageError
from hub.manifest import BaseIdentity, TrainedOn

_HOME = "_moduloom_base"  # attribute of the model that holds its Source
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer_config.json",  # of tokenizers without a vocabulary, such as those of bytes
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


@dataclass(frozen=True)
class BaseOrigin:
    """Where a loaded base comes from; ``location`` is None for a model made in memory."""

    name: str
    location: Location | None
    identity: BaseIdentity | None = None
    seen: int = 0  # which tensors ``identity`` was read from (see _tensors_key)
    drawn: tuple[str, ...] = ()  # tensors that the checkpoint lacks: drawn with seed 0


def load_base(
    base: str | Path | PreTrainedModel,
    *,
    quantize: str = "none",
    double_quant: bool = True,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    task: str | None = None,
    labels: Sequence[str] | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a base model, frozen and in eval mode.

    Parameters
    ----------
    base
        ``builtin:tiny-lm``, a directory, ``org/name[@revision]``, or a model already loaded. That one is returned as
        it is, in eval mode: its parameters are frozen when the first adapter comes, and thawed by ``eject``.
    quantize
        ``none``; ``int8`` (LLM.int8(), arXiv:2208.07339); ``nf4`` (QLoRA, arXiv:2305.14314: 4 bits and one absmax a
        block of 64). Heads and the embeddings stay dense. Both run on CPU and on CUDA.
    double_quant
        Quantize the absmax of nf4 as well: 4.13 instead of 4.5 bits a parameter.
    dtype
        Of everything that is not quantized, and of the computation; default: the checkpoint's own.
    device
        Default: the process's CUDA device if there is one, else the CPU.
    task
        ``causal_lm``, ``masked_lm``, ``seq2seq``, ``classification``, ``token_classification`` or ``regression``;
        default: what the checkpoint was saved as.
    labels
        Names of the classes. A head that the checkpoint lacks is drawn with seed 0.
    trust_remote_code
        Run code that comes with the checkpoint. Never needed for the families transformers knows.

    Raises
    ------
    HubError
        No such base, pickled weights, an unknown option (with a suggestion), a checkpoint that lacks tensors.
    """
    request = BaseRequest(
        task=task or ("classification" if labels else None),
        labels=tuple(labels) if labels else None,
        quantize=quantize,
        double_quant=double_quant,
        dtype=dtype,
        device=device,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    if not isinstance(base, str | Path):
        return _adopt(bare_model(base), request)
    where = locate(base)
    model, drawn = load_files(where.directory, request)
    model.requires_grad_(False).eval()
    keep_differentiable(model)
    _remember(model, BaseOrigin(where.name, where, drawn=drawn))
    if fact(model.config, "pad_token_id") is None and type(model).__name__.endswith("ForSequenceClassification"):
        fill_pad_id(model.config, _padding(model))
    return model


def _padding(model: PreTrainedModel) -> int | None:
    """Id of the token that texts are padded with: a classifier looks for the last token before it."""
    try:
        token = tokenizer_of(model).pad_token_id
    except GateError:  # the files hold no tokenizer
        token = fact(model.config, "eos_token_id")
    return token[0] if isinstance(token, list) else cast("int | None", token)


def _adopt(model: PreTrainedModel, request: BaseRequest) -> PreTrainedModel:
    quantization = quantization_of(model)
    if request.quantize not in ("none", quantization):
        raise UsageError(
            f"this {type(model).__name__} is loaded already, as {quantization}; "
            f"it cannot be made {request.quantize} any more",
            hint=f'give its directory or id instead: load("...", quantize="{request.quantize}")',
        )
    given = [name for name in ("task", "labels", "attn_implementation") if getattr(request, name) is not None]
    if given:
        raise UsageError(
            f"{' and '.join(given)} cannot be changed on a model that is loaded already",
            hint="give the directory or the id of the model instead of the model",
        )
    if request.dtype is not None or request.device is not None:
        if quantization != "none":
            raise UsageError(
                f"a model held as {quantization} keeps its dtype and device", hint="pass them where it is loaded"
            )
        model.to(dtype=request.torch_dtype, device=request.device)
    keep_differentiable(model)
    if _HOME not in model.__dict__:
        _remember(model, BaseOrigin(str(getattr(model.config, "_name_or_path", "") or type(model).__name__), None))
    return cast("PreTrainedModel", model.eval())


def tokenizer_of(base: str | Path | PreTrainedModel, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Tokenizer of a base; one without a padding token pads with its end token.

    Raises
    ------
    NotFound, GateError
        There is no such base, or it has no tokenizer.
    """
    if not isinstance(base, str | Path):
        location = _source(bare_model(base)).location
        if location is None:
            raise GateError(
                f"this {type(base).__name__} was made in memory and has no tokenizer",
                hint="compose.tokenizer(directory), or AutoTokenizer.from_pretrained",
            )
        where = location
    else:
        where = locate(base)
    hint = "save one beside the model: tokenizer.save_pretrained(directory)"
    if not any((where.directory / name).is_file() for name in _VOCABULARIES):
        # transformers would make one without words for some families
        raise GateError(f"{where.name} has no tokenizer", path=where.directory, hint=hint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            where.directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        message = f"{where.name} has no tokenizer that can be read: {str(error).splitlines()[0]}"
        raise GateError(message, path=where.directory, hint=hint) from error
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return cast("PreTrainedTokenizerBase", tokenizer)


def identity_of(base: str | Path | PreTrainedModel) -> BaseIdentity:
    """Identity of a base: of its unquantized files where it has some, else of the tensors in memory.

    A dense model that was loaded from files elsewhere and still equals them (cast to its dtype) is the base of those
    files. The result is kept on the model until its tensors change.

    Raises
    ------
    GateError
        A quantized model whose unquantized files are not at hand.
    """
    if isinstance(base, str | Path):
        where = locate(base)
        if _holds_quantized(where):
            raise quantized_files(where.directory)
        return directory_identity(where)
    base = bare_model(base)
    source = _source(base)
    key = 0 if source.location else _tensors_key(base)
    if source.identity is None or source.seen != key:
        source = replace(source, identity=_read_identity(base, source), seen=key)
        _remember(base, source)
    return cast("BaseIdentity", source.identity)


def known_identity(base: str | Path | PreTrainedModel, *, allow_drift: bool) -> BaseIdentity | None:
    """As :func:`identity_of`; with ``allow_drift`` None, and a warning, for a quantized model of unknown origin."""
    if isinstance(base, str | Path):
        return identity_of(base)
    try:
        return identity_of(base)
    except GateError as error:
        if not allow_drift or quantization_of(bare_model(base)) == "none":
            raise
        warnings.warn(f"{error.message}: adapters are not compared with it", BaseWarning, stacklevel=3)
        return None


def name_of(base: PreTrainedModel) -> str:
    """Return what the base is called in manifests: ``builtin:tiny-lm``, ``org/name``, a directory's name."""
    source = _source(base)
    return source.location.name if source.location else source.name


def drawn_tensors(base: PreTrainedModel) -> tuple[str, ...]:
    """Names of the tensors that the base's checkpoint lacks, such as those of a head: chance has drawn them."""
    return _source(base).drawn


def check_base(
    made_for: BaseIdentity,
    model: PreTrainedModel,
    *,
    trained_on: TrainedOn | None = None,
    ref: str | None = None,
    allow_drift: bool = False,
) -> Rung:
    """Compare the base an adapter was made for with a loaded one; see :func:`compose.base.compatibility.compare`.

    One of unknown identity counts as drift.
    """
    known = known_identity(model, allow_drift=allow_drift)
    if known is None:
        return "drift"
    return compare(
        made_for,
        known,
        trained_on=trained_on,
        quantization=quantization_of(model),
        ref=ref,
        allow_drift=allow_drift,
    )


def _remember(model: PreTrainedModel, source: BaseOrigin) -> None:
    model.__dict__[_HOME] = source


def _source(model: PreTrainedModel) -> BaseOrigin:
    if _HOME not in model.__dict__:
        _remember(model, BaseOrigin(str(getattr(model.config, "_name_or_path", "") or type(model).__name__), None))
    return cast("BaseOrigin", model.__dict__[_HOME])


def _tensors_key(model: PreTrainedModel) -> int:
    tensors = (*model.named_parameters(), *model.named_buffers())
    return hash(tuple((n, t.data_ptr(), 0 if t.is_inference() else t._version) for n, t in tensors))


def _read_identity(model: PreTrainedModel, source: BaseOrigin) -> BaseIdentity:
    if source.location is not None:
        return directory_identity(source.location)
    where = _files_of(source.name)
    if quantization_of(model) != "none":
        if where is None or _holds_quantized(where):
            raise GateError(
                f"this {type(model).__name__} is quantized and its unquantized files are not at hand, "
                "so its identity is unknown",
                hint=f'load it with load(directory_or_id, quantize="{quantization_of(model)}"), '
                "or pass allow_base_drift=True: then it is compared with nothing",
            )
        return directory_identity(where)
    if where is not None:
        stored = directory_identity(where)
        if _equals_files(model, stored, where):
            return stored
    return model_identity(model, repo=Path(source.name).name or type(model).__name__)


def _files_of(name: str) -> Location | None:
    """Files that transformers says a model came from, if they are here; nothing is downloaded."""
    if not name or name.startswith(BUILTIN):
        return None
    try:
        return locate(name, offline=True)
    except HubError:
        return None  # then the tensors in memory are what is fingerprinted


def _holds_quantized(where: Location) -> bool:
    config = where.directory / "config.json"
    return config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("quantization_config") is not None


def _equals_files(model: nn.Module, stored: BaseIdentity, where: Location) -> bool:
    """Whether every tensor below the head is in the files, with the values it has in memory."""
    from safetensors import safe_open

    from compose.base.location import weight_files

    tensors = base_tensors(cast("PreTrainedModel", model))
    stem = f"{getattr(model, 'base_model_prefix', '')}."
    inner = {name for name in tensors if name.startswith(stem)} or set(tensors)
    if not inner <= stored.weights.keys():
        return False
    for file in weight_files(where.directory):
        with safe_open(file, framework="pt") as handle:
            for name in tensors.keys() & set(handle.keys()):
                in_memory = tensors[name]
                value = handle.get_tensor(name)
                if value.shape != in_memory.shape or tensor_hex16(value.to(in_memory.dtype)) != tensor_hex16(in_memory):
                    return False
    return True
