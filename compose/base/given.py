"""The model that a caller has given: inside what wraps one, and refused by name where it is none that adapters fit."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from hub.errors import GateError, UsageError

_WRAPPED = ("_orig_mod", "module")  # in torch.compile's module; in DataParallel and its kin


def bare_model(given: Any) -> PreTrainedModel:
    """The transformers model that is given, or wrapped by ``torch.compile``, DataParallel and their kin.

    Raises
    ------
    UsageError
        Something else, by the name of its type.
    GateError
        A model that PEFT has put its own layers into: adapters of both would act at once.
    """
    model = given
    while isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel):
        inner = next((model._modules[name] for name in _WRAPPED if name in model._modules), None)
        if inner is None:
            break
        model = inner
    if isinstance(model, nn.Module) and any(of_peft(module) for module in model.modules()):
        raise GateError(
            f"this {type(model).__name__} has layers of PEFT in it, whose adapters would act beside those of compose",
            hint="save them with save_pretrained(DIR), take the model back with unload(), "
            "and compose.attach(model, NAME, DIR)",
        )
    if not isinstance(model, PreTrainedModel):
        kind = type(given).__name__
        raise UsageError(
            f"adapters act in a transformers model, and this is a {kind}",
            hint="give builtin:tiny-lm, a model directory, a Hugging Face id, or a PreTrainedModel",
        )
    return cast("PreTrainedModel", model)


def of_peft(module: object) -> bool:
    """Whether a module is a layer or a model of PEFT's, which need not be installed."""
    return isinstance(module, nn.Module) and type(module).__module__.partition(".")[0] == "peft"
