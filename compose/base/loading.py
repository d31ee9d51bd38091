"""From files to a model: the transformers side of ``compose.base.model``."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from compose.base.compatibility import BaseWarning
from compose.base.location import weight_files
from compose.base.quantization import bitsandbytes_config, warn_of_dense_weights
from compose.base.request import TASKS, BaseRequest
from hub.contents.tensor_files import read_header
from hub.errors import GateError

_SAVED_AS = {  # end of the architecture's name -> task
    "ForMaskedLM": "masked_lm",
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token_classification",
}


def load_files(directory: Path, request: BaseRequest) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Load the model in ``directory``, and the names of its tensors that the checkpoint lacks and chance has drawn.

    Never reads a pickle, never touches the network.
    """
    files = weight_files(directory)
    for file in files:
        read_header(file.resolve())  # says plainly what is wrong with a broken file
    with quiet_transformers():
        config = model_config(directory, request)
        task = request.task or saved_task(config)
        auto = model_class(config, request, directory)
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
            options["quantization_config"] = bitsandbytes_config(auto, config, request)
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
        warn_of_dense_weights(model, request.quantize)
    drawn = tuple(sorted(report["missing_keys"]))
    return (model if request.quantize != "none" else model.to(request.torch_device)), drawn


def saved_task(config: Any) -> str:
    """The task a checkpoint was saved for: by its architecture's name, ``causal_lm`` where that says nothing."""
    if config.is_encoder_decoder:
        return "seq2seq"
    name = (config.architectures or [""])[0]
    return next((task for end, task in _SAVED_AS.items() if name.endswith(end)), "causal_lm")


class _Own:
    """A model class with the constructors of an auto class."""

    def __init__(self, cls: type[PreTrainedModel]) -> None:
        self._cls = cls

    def from_config(self, config: Any, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
        return cast("PreTrainedModel", self._cls._from_config(config, **options))

    def from_pretrained(self, directory: Path, trust_remote_code: bool = False, **options: Any) -> Any:
        return self._cls.from_pretrained(directory, **options)


def model_class(config: Any, request: BaseRequest, directory: Path) -> Any:
    """The class that loads a base for its task, or for what no task fits (images, sounds) the checkpoint's own.

    Raises
    ------
    GateError
        There is none for the task that is asked for.
    """
    task = request.task or saved_task(config)
    auto = getattr(transformers, TASKS[task])
    if type(config) in auto._model_mapping or request.trust_remote_code:
        return auto
    own = getattr(transformers, (config.architectures or [""])[0], None)
    if request.task is not None or not (isinstance(own, type) and issubclass(own, PreTrainedModel)):
        saved = f"saved as {', '.join(config.architectures or ['?'])}"
        told = f"{directory} cannot be loaded for {task}: {config.model_type} has no model for {task}"
        raise GateError(told, path=directory, hint=saved)
    return _Own(own)


def model_config(directory: Path, request: BaseRequest) -> Any:
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
        raise quantized_files(directory)
    if request.labels is not None:
        config.num_labels = len(request.labels)
        config.id2label = dict(enumerate(request.labels))
        config.label2id = {label: i for i, label in enumerate(request.labels)}
    if request.task == "regression":
        config.num_labels, config.problem_type = 1, "regression"
    elif request.task == "classification":
        config.problem_type = getattr(config, "problem_type", None) or "single_label_classification"
    return config


def quantized_files(directory: Path) -> GateError:
    """The error for a model directory whose weights are quantized already."""
    return GateError(
        f"{directory} holds weights that are quantized already; adapters are made for the unquantized files",
        path=directory,
        hint='give the original model and quantize="nf4" or "int8"',
    )


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


# -- surroundings --------------------------------------------------------------------------------------------------


@contextmanager
def _seeded() -> Iterator[None]:
    """A head the checkpoint lacks is the same at every load, and the caller's random stream stays where it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@contextmanager
def quiet_transformers() -> Iterator[None]:
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
