"""A training state in one safetensors file: tensors as tensors, all else as JSON in the header; no pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from hub.io.files import atomic_write
from train.errors import TrainError

__all__ = ["CHECKPOINT", "read_checkpoint", "write_checkpoint"]

CHECKPOINT = "checkpoint.safetensors"  # its name in a run's folder
_TENSOR, _PAIRS = "__tensor__", "__pairs__"


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write the nested state, whole or not at all: until the new file is complete the old one stays.

    Raises
    ------
    TrainError
        The disk is full or the folder cannot be written; the previous checkpoint is untouched.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_pack(state, tensors), separators=(",", ":"))
    data = safetensors.torch.save(tensors, metadata={"format": "pt", "state": skeleton})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f".{path.name}.*.tmp"):  # left by a kill in the middle of a write
            stale.unlink()
        atomic_write(path, data)
    except OSError as error:
        kept = "the previous checkpoint is intact" if path.exists() else "there is no checkpoint yet"
        raise TrainError(
            f"cannot write the checkpoint {path}: {error.strerror}; {kept}",
            path=path,
            hint="make room and run again with --resume",
        ) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote.

    Raises
    ------
    TrainError
        The file is missing, or is not a whole checkpoint.
    """
    if not path.is_file():
        raise TrainError(f"nothing to resume: no {path}", path=path, hint="start without --resume, in an empty folder")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            skeleton = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        state = _unpack(skeleton, tensors)
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        raise TrainError(
            f"{path} is not a whole checkpoint: {error}", path=path, hint="start without --resume, in an empty folder"
        ) from error
    if not isinstance(state, dict):
        raise TrainError(f"{path} is not a checkpoint of this program", path=path)
    return state


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for a nested value; tensors move into `tensors`, dictionaries with other keys than text become pairs."""
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().clone()  # a file may not hold shared memory
        return {_TENSOR: name}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _pack(inner, tensors) for key, inner in value.items()}
        return {_PAIRS: [[key, _pack(inner, tensors)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        return [_pack(inner, tensors) for inner in value]
    return value


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(inner, tensors) for inner in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _PAIRS in value:
        return {key: _unpack(inner, tensors) for key, inner in value[_PAIRS]}
    return {key: _unpack(inner, tensors) for key, inner in value.items()}
