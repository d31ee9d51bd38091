"""Artifacts for other engines: a PEFT directory, a LoRA that vLLM takes, or a whole model with the adapter folded in.

Each format is a function under :func:`form`; what it had to change or lose is measured and told.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compose.api import attach, eject, load, tokenizer
from compose.artifacts import probes
from compose.base.at_hand import at_hand
from compose.base.loading import quiet_transformers
from compose.base.model import load_base, name_of
from compose.base.quantization import quantization_of, quantized_layers
from compose.base.weights import dense_weight
from compose.errors import KindError
from compose.formats import peft as peft_layout
from compose.formats.directory import export_peft
from compose.formats.files import CONFIG, EXTRA, WEIGHTS, read_config, write_config
from compose.kind.registry import get_kind
from compose.merging.fold import Folded, fold
from compose.merging.merge import lower_to_lora
from compose.merging.whole_layers import widen
from compose.runtime.model_runtime import runtime
from hub.errors import Conflict, GateError, UsageError, suggest
from hub.io.files import fsync_directory
from hub.store import Artifact, Store

__all__ = ["FORMATS", "Exported", "export"]

# Ranks that vLLM reserves room for (--max-lora-rank).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_PLAIN_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")  # PEFT adds no head of its own to these


@dataclass(frozen=True)
class Request:
    """What to export, and how; see :func:`export`."""

    artifact: Artifact
    store: Store
    base: str | Path | None
    rank: int | None
    quantize: str | None
    base_name: str | None
    allow_base_drift: bool

    def load(self, quantize: str = "none") -> PreTrainedModel:
        """The base with the artifact active on it."""
        return load(
            self.where,
            str(self.artifact.ref),
            quantize=quantize,
            store=self.store,
            allow_base_drift=self.allow_base_drift,
        )

    @property
    def where(self) -> str | Path:
        """The base given, else the one the artifact was made for."""
        made_for = self.artifact.manifest.base
        if self.base is None and made_for is None:
            raise UsageError(f"{self.artifact.ref} does not say which base it is for", hint="give --base BASE")
        return self.base or at_hand(made_for)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Exported:
    """What was written, what to know of it in sentences, and what was measured."""

    ref: str
    format: str
    directory: str
    notes: tuple[str, ...] = ()
    measured: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "notes": list(self.notes), "measured": dict(self.measured)}


Told = tuple[Sequence[str], Mapping[str, float]]
FORMATS: dict[str, Callable[[Request, Path], Told]] = {}


def form(name: str) -> Callable[[Callable[[Request, Path], Told]], Callable[[Request, Path], Told]]:
    """Register a format: a function that fills a directory and tells notes and figures."""

    def add(function: Callable[[Request, Path], Told]) -> Callable[[Request, Path], Told]:
        FORMATS[name] = function
        return function

    return add


def export(
    ref: str,
    format: str,
    out: Path,
    *,
    store: Store | None = None,
    base: str | Path | None = None,
    rank: int | None = None,
    quantize: str | None = None,
    base_name: str | None = None,
    allow_base_drift: bool = False,
) -> Exported:
    """Write an artifact for another engine: whole, or not at all.

    Parameters
    ----------
    ref
        An adapter, a merge, or a composition of the store.
    format
        ``peft``, ``vllm`` or ``merged``.
    out
        A directory that does not exist yet, or is empty.
    base
        As for :func:`compose.load`; default: the one it was made for.
    rank
        vllm: of the LoRA that stands for what is none; exact sums of LoRAs need no rank.
    quantize
        merged: fold into the weights as this quantization rounds them; default: into the unquantized ones.
    base_name
        peft, vllm: ``base_model_name_or_path``; vLLM's resolver compares it with the name the model is served under.

    Raises
    ------
    UsageError, Conflict
        An unknown format; a directory that holds something.
    HubError
        What the format cannot express, by name; nothing is written then.
    """
    if format not in FORMATS:
        raise UsageError(f"there is no format {format!r}", hint=suggest(format, FORMATS) or ", ".join(FORMATS))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Conflict(f"{out} exists already", path=out, hint="give another directory with --to")
    home = store or Store()
    request = Request(home.get(ref), home, base, rank, quantize, base_name, allow_base_drift)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as room:
        young = Path(room) / "young"
        young.mkdir()
        notes, measured = FORMATS[format](request, young)
        young.replace(out)
    fsync_directory(out.parent)
    return Exported(str(request.artifact.ref), format, str(out), tuple(notes), measured)


@form("peft")
def _peft(request: Request, out: Path) -> Told:
    """The directory that ``PeftModel.from_pretrained`` reads; the base is loaded only where PEFT wants its head."""
    artifact = _one_adapter(request, "PEFT")
    fields = read_config(artifact.file(CONFIG))
    peft_type = get_kind(artifact.manifest.kind).peft_type
    if peft_type is None:
        raise KindError(
            f"{artifact.ref} is a {artifact.manifest.kind}, which PEFT does not have",
            hint="--format merged folds it into the base, where it is a change of weights",
        )
    plain = _PLAIN_TASKS if peft_type in peft_layout.PROMPT_LEARNING else (*_PLAIN_TASKS, None)
    on_parts = "peft_type" not in fields
    if not on_parts and EXTRA not in artifact.files and fields.get("task_type") in plain:
        _copy(request, fields, out)
        return (), {}
    model = request.load()
    adapter, told = attach(model, str(artifact.ref), artifact, allow_base_drift=True), list[str]()
    if on_parts:
        wide = widen(model, adapter)
        adapter = wide.adapter
        told.append(f"its parts of fused layers are written as whole layers: {wide.certificate}")
    sites, named = runtime(model).sites, request.base_name or name_of(model)
    export_peft(adapter, out, sites=sites, model=model, base=named, task=artifact.manifest.task)
    return told, {}


@form("vllm")
def _vllm(request: Request, out: Path) -> Told:
    """One plain LoRA by vLLM's rules: factors A and B alone, no DoRA, no biases, no whole modules, r <= 512."""
    artifact, notes, measured = request.artifact, list[str](), dict[str, float]()
    manifest = artifact.manifest
    if manifest.task not in (None, "causal_lm"):
        raise KindError(f"{artifact.ref} is for {manifest.task}, and vLLM serves adapters of causal language models")
    fields = read_config(artifact.file(CONFIG)) if manifest.type in ("adapter", "merge") else {}
    if manifest.kind == "lora" and "peft_type" in fields:
        if EXTRA in artifact.files:
            raise KindError(
                f"{artifact.ref} carries whole modules (modules_to_save), which vLLM refuses",
                hint="--format merged makes a model of it that vLLM serves",
            )
        _copy(request, fields, out)
    else:
        model = request.load()
        lowered = lower_to_lora(model, runtime(model).rows[0], rank=request.rank)
        if lowered.adapter.saved:
            raise KindError(f"{artifact.ref} carries whole modules, which vLLM refuses", hint="use --format merged")
        sites, named = runtime(model).sites, request.base_name or name_of(model)
        export_peft(lowered.adapter, out, sites=sites, model=model, base=named, task="causal_lm")
        measured["discarded"] = lowered.certificate.share
        notes.append(f"written as one LoRA: {lowered.certificate}")
    rank = _check_vllm(out)
    room = next(most for most in VLLM_RANKS if rank <= most)
    notes.append(f"serve it with: vllm serve BASE --enable-lora --max-lora-rank {room} --lora-modules NAME=DIR")
    return notes, measured


def _check_vllm(directory: Path) -> int:
    """Compare a directory with what vLLM reads; returns the rank."""
    from hub.contents.tensor_files import read_header

    fields = read_config(directory / CONFIG)
    names = [info.name for info in read_header(directory / WEIGHTS).tensors]
    odd = [name for name in names if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if odd or not all(name.startswith("base_model.model.") for name in names):
        raise GateError(f"vLLM has no place for {(odd or names)[0]}", path=directory)
    if fields.get("use_dora") or fields.get("bias") not in (None, "none") or fields.get("modules_to_save"):
        raise GateError("vLLM takes neither DoRA, nor biases, nor modules_to_save", path=directory)
    if not isinstance(fields.get("target_modules"), list):
        raise GateError("vLLM wants target_modules as a list", path=directory)
    rank = int(fields["r"])
    if rank > VLLM_RANKS[-1]:
        raise KindError(
            f"the rank is {rank}, and vLLM takes at most {VLLM_RANKS[-1]}",
            hint=f"hub compose REF --merge --rank {VLLM_RANKS[-1]} -o NS/NAME@VERSION, then export that",
        )
    return rank


def _copy(request: Request, fields: dict[str, Any], out: Path) -> None:
    """The artifact's own files, which are PEFT's where they hold no whole modules."""
    if request.base_name is not None:
        fields = {**fields, "base_model_name_or_path": request.base_name}
    write_config(out / CONFIG, fields)
    shutil.copyfile(request.artifact.file(WEIGHTS), out / WEIGHTS)
    if "README.md" in request.artifact.files:
        shutil.copyfile(request.artifact.file("README.md"), out / "README.md")


def _one_adapter(request: Request, engine: str) -> Artifact:
    manifest = request.artifact.manifest
    if manifest.type not in ("adapter", "merge"):
        raise KindError(
            f"{request.artifact.ref} is a {manifest.type}, and {engine} reads one adapter a directory",
            hint=f"make it one adapter first: hub compose {request.artifact.ref} --merge -o NS/NAME@VERSION",
        )
    return request.artifact


@form("merged")
@torch.no_grad()
def _merged(request: Request, out: Path) -> Told:
    """The base with the composition in its weights, as a model directory with its tokenizer.

    Measured: ``rounding``, the largest share of a weight's change that its dtype has rounded away; ``effect``,
    ||e_merged - e_active|| / ||e_active|| of the logits of a few probes; ``base_shift``, ||W_q - W|| / ||W|| of the
    weights that a quantization has changed; ``training``, as ``effect``, against the base as it was held in training.
    """
    quantize = request.quantize or "none"
    model = request.load(quantize)
    expr, name = runtime(model).rows[0], str(request.artifact.ref)
    ids = probes.tokens(model)
    active = probes.logits(model, ids)
    folded = list(fold(model, expr))
    eject(model)
    bare = probes.logits(model, ids)
    whole, measured = _dense(request, model)
    _put(whole, folded)
    merged = probes.logits(whole, ids)
    measured["rounding"] = max((part.rounding for part in folded), default=0.0)
    measured["effect"] = probes.relative_error(merged - bare, active - bare, active)
    notes = [f"{len(folded)} tensors of {name_of(model)} changed, up to {measured['rounding']:.1%} lost by rounding"]
    trained = request.artifact.manifest.trained_on
    if trained is not None and trained.quantization not in ("none", quantize):
        measured["training"] = _against_training(request, ids, merged, trained.quantization)
        notes.append(
            f"{name} was trained on a base held as {trained.quantization}, where its effect was another by "
            f"{measured['training']:.1%}; --quantize {trained.quantization} folds into those weights"
        )
    if quantize != "none":
        notes.append(
            f"the weights are those of {quantize}, {measured['base_shift']:.1%} away from the unquantized ones"
        )
    with quiet_transformers():
        whole.save_pretrained(out)
    _save_tokenizer(request.where, out)
    return notes, measured


def _dense(request: Request, model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, float]]:
    """The model to write into, unquantized: with the weights of the quantized one where there is one."""
    if quantization_of(model) == "none":
        return model, {}
    manifest = request.artifact.manifest
    whole = load_base(request.where, task=manifest.task, labels=manifest.labels or None)
    shift = size = 0.0
    for path, layer in quantized_layers(model).items():
        weight = whole.get_submodule(path).weight
        rounded = dense_weight(layer).to(weight)
        shift += float((rounded.float() - weight.float()).square().sum())
        size += float(weight.float().square().sum())
        weight.copy_(rounded)
    return whole, {"base_shift": (shift / size) ** 0.5 if size else 0.0}


def _put(model: PreTrainedModel, folded: Sequence[Folded]) -> None:
    values = {part.name: part.value for part in folded}
    holders: dict[int, list[str]] = {}  # names by the parameter they stand for, each module once
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(f"{path}.{name}")
    for part in folded:
        parameter = model.get_parameter(part.name)
        for other in holders[id(parameter)]:
            if other not in values or not torch.equal(values[other], part.value):
                raise KindError(
                    f"{part.name} is tied to {other} in this base, which would change with it",
                    hint="adapt both or none of them, or export --format peft",
                )
        parameter.data.copy_(part.value)


def _against_training(request: Request, ids: Tensor, merged: Tensor, quantization: str) -> float:
    model = request.load(quantization)
    active = probes.logits(model, ids)
    eject(model)
    bare = probes.logits(model, ids)
    return probes.relative_error(merged - bare, active - bare, active)


def _save_tokenizer(base: str | Path, out: Path) -> None:
    try:
        found = tokenizer(base)
    except GateError:  # a base without one
        return
    found.save_pretrained(out)
