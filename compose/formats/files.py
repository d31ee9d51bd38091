"""Reading and writing adapter_config.json and the safetensors files of an adapter, an artifact's or a directory's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.errors import KindError
from compose.kind.registry import kinds
from hub.contents.checks import CONFIG, EXTRA, WEIGHTS
from hub.errors import IntegrityError, NotFound
from hub.foreign.peft_config import peft_kind
from hub.io.disk import tensor_file
from hub.store import Artifact

if TYPE_CHECKING:  # what is asked of configs alone needs no torch
    from torch import Tensor

OWN_KIND = "moduloom_kind"  # field of a config that is ours and not PEFT's


def has(where: Artifact | Path, name: str) -> bool:
    """Whether an adapter has a file of that name."""
    return name in where.files if isinstance(where, Artifact) else (where / name).exists()


def file_of(where: Artifact | Path, name: str) -> Path:
    """Path of a file of an adapter; that of an artifact is there, and every byte of it checked."""
    return where.file(name) if isinstance(where, Artifact) else where / name


# -- the config ----------------------------------------------------------------------------------------------------


def read_config(path: Path) -> dict[str, Any]:
    """Fields of an adapter_config.json.

    Raises
    ------
    NotFound, IntegrityError
        There is none, or it holds no JSON object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(
            f"{path.parent} is no adapter directory: it has no {path.name}",
            path=path,
            hint="give the directory that save_pretrained or compose.save has written",
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise IntegrityError(f"{path} is not JSON: {error}", path=path) from None
    if not isinstance(fields, dict):
        raise IntegrityError(f"{path} holds no JSON object", path=path)
    return fields


def kind_of(fields: Mapping[str, Any]) -> str:
    """Name of the kind that reads a config, ours or PEFT's; KindError for a PEFT type that none reads."""
    if OWN_KIND in fields:
        return str(fields[OWN_KIND])
    if (name := peft_kind(fields)) is not None:
        return name
    read = {t: name for name, kind in kinds().items() for t in (kind.peft_type, *kind.peft_aliases) if t}
    peft_type = fields.get("peft_type")
    if peft_type not in read:
        hint = "PEFT types read here: " + ", ".join(sorted(read))
        raise KindError(f"no kind reads PEFT type {peft_type!r}", hint=hint)
    return read[peft_type]  # of another package


def peek(directory: str | Path) -> tuple[str, dict[str, Any]]:
    """Name of the kind and the raw config fields of an adapter directory, without a base."""
    fields = read_config(Path(directory) / CONFIG)
    return kind_of(fields), fields


def write_config(path: Path, fields: Mapping[str, Any]) -> None:
    """Write an adapter_config.json in its one form: keys and lists of names sorted."""
    text = json.dumps(_sorted(fields), indent=2, sort_keys=True, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _sorted(value: Any) -> Any:
    """Sort lists of names too: PEFT writes some from sets, whose order changes from process to process."""
    if isinstance(value, dict):
        return {k: _sorted(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [_sorted(v) for v in value]
        return sorted(items) if all(isinstance(v, str) for v in items) else items
    return value


# -- the tensors ---------------------------------------------------------------------------------------------------


def read_tensors(where: Artifact | Path) -> dict[str, Tensor]:
    """Tensors of an adapter's weights and, where it has one, extra file (safetensors only; nothing is unpickled)."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for name in (WEIGHTS, EXTRA):
        if name == EXTRA and not has(where, EXTRA):
            continue
        path = file_of(where, name)
        try:
            read = load_file(path)
        except FileNotFoundError:
            hint = "a pickle such as adapter_model.bin is never read: re-save it with safetensors"
            raise NotFound(f"{path} is missing", path=path, hint=hint) from None
        except (SafetensorError, OSError) as error:
            raise IntegrityError(f"{path} is no readable safetensors file: {error}", path=path) from None
        if twice := sorted(tensors.keys() & read.keys()):
            raise IntegrityError(f"{path} and {WEIGHTS} both hold {twice[0]}", path=path)
        tensors.update({key: _widened(value) for key, value in read.items()})
    return tensors


def _widened(value: Tensor) -> Tensor:
    """8-bit floats as bfloat16, which holds each of them exactly: torch computes nothing in 8 bits."""
    return value.bfloat16() if value.dtype.is_floating_point and value.dtype.itemsize == 1 else value


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, in the order of their names: equal ones give equal bytes."""
    from safetensors.torch import save_file

    seen: set[int] = set()
    apart: dict[str, Tensor] = {}  # safetensors refuses tensors that share memory, as a head's tied biases do
    for key, value in sorted(tensors.items()):
        stored = value.detach().cpu().contiguous()
        apart[key] = stored.clone() if stored.data_ptr() in seen else stored
        seen.add(stored.data_ptr())
    # One metadata key only: with more, safetensors' bytes are not deterministic.
    with tensor_file(path):
        save_file(apart, path, metadata={"format": "pt"})
