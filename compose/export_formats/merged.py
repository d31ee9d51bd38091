"""A whole model with the adapter in its weights, as a model directory with its tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compose.api import eject, tokenizer
from compose.artifacts import probes
from compose.artifacts.export_format import FORMATS, ExportFormat, Written
from compose.base.loading import quiet_transformers
from compose.base.model import load_base, name_of
from compose.base.quantization import quantization_of, quantized_layers
from compose.base.weights import dense_weight
from compose.merging.fold import fold, put
from compose.runtime.model_runtime import runtime
from hub.errors import GateError


@FORMATS.register("merged")
class MergedModel(ExportFormat):
    """The base with the composition in its weights.

    Measured: ``rounding``, the largest share of a weight's change that its dtype has rounded away; ``effect``,
    `||e_merged - e_active|| / ||e_active||` of the logits of a few probes; ``base_shift``, `||W_q - W|| / ||W||` of the
    weights that a quantization has changed; ``training``, as ``effect``, against the base as it was held in training.
    """

    options = frozenset({"quantize"})

    @torch.no_grad()
    def write(self, out: Path) -> Written:
        """Fold, compare with the model in which the composition is active, and save."""
        quantize = self.quantize or "none"
        model = self.load(quantize)
        expr, name = runtime(model).rows[0], str(self.artifact.ref)
        ids = probes.tokens(model)
        active = probes.logits(model, ids)
        folded = list(fold(model, expr))
        eject(model)
        bare = probes.logits(model, ids)
        whole, measured = _dense(self, model)
        untied = put(whole, folded)
        merged = probes.logits(whole, ids)
        measured["rounding"] = max((part.rounding for part in folded), default=0.0)
        measured["effect"] = probes.relative_error(merged - bare, active - bare, active)
        notes = [
            f"{len(folded)} tensors of {name_of(model)} changed, up to {measured['rounding']:.1%} lost by rounding"
        ]
        if untied:
            notes.append(f"{untied} was tied to the embeddings, which changed alone: the model is saved untied")
        trained = self.artifact.manifest.trained_on
        if trained is not None and trained.quantization not in ("none", quantize):
            measured["training"] = _against_training(self, ids, merged, trained.quantization)
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
        _save_tokenizer(self.where, out)
        return notes, measured


def _dense(request: ExportFormat, model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, float]]:
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


def _against_training(request: ExportFormat, ids: Tensor, merged: Tensor, quantization: str) -> float:
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
