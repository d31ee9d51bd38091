"""Weights in several files, and an index that says which tensor is in which, become the one file of an adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from hub.contents.checks import WEIGHTS
from hub.contents.tensor_files import Header, TensorInfo, read_header
from hub.errors import GateError, IntegrityError, NotFound
from hub.io import canonical_json as canonical
from hub.io.files import open_regular, read_capped

INDEX = f"{WEIGHTS}.index.json"


def shards(index: Path) -> tuple[str, ...]:
    """Names of the files that an index lists, sorted.

    Raises
    ------
    GateError, ManifestError
        It is no index, or names anything but safetensors files beside it.
    """
    table = canonical.loads(read_capped(index, canonical.MAX_JSON), what=str(index))
    names = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise GateError(f"{index} has no weight_map of tensor names to files", path=index)
    for name in names.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise GateError(f"{index} names {name[:80]!r}, which is no safetensors file beside it", path=index)
    return tuple(sorted(set(names.values())))


def join(index: Path, out: Path) -> None:
    """Write the tensors of all shards into one safetensors file; their bytes are copied as they are.

    Raises
    ------
    GateError, IntegrityError, NotFound
        A shard is missing or damaged, a tensor is in two of them, or they do not hold what the index lists.
    """
    files = [index.parent / name for name in shards(index)]
    if missing := [path.name for path in files if not path.exists()]:
        raise NotFound(f"{index.parent} lacks {', '.join(missing)}, which {index.name} lists", path=index.parent)
    headers = [read_header(path) for path in files]
    tensors = [tensor for header in headers for tensor in header.tensors]
    names = [tensor.name for tensor in tensors]
    listed = canonical.loads(read_capped(index, canonical.MAX_JSON), what=str(index))["weight_map"].keys()
    if len(set(names)) != len(names) or set(names) != listed:
        raise IntegrityError(f"the files of {index} do not hold each of the tensors that it lists once", path=index)
    head = _header(headers)
    with out.open("xb") as target:
        target.write(len(head).to_bytes(8, "little") + head)
        for path, header in zip(files, headers, strict=True):
            with open_regular(path) as source:
                source.seek(header.data_start)
                shutil.copyfileobj(source, target, 2**20)


def _header(headers: list[Header]) -> bytes:
    """Header of the joined file: each shard's tensors in their order, behind those of the shard before."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for header in headers:
        entries |= {tensor.name: _entry(tensor, at - header.data_start) for tensor in header.tensors}
        at += header.size - header.data_start
    head = json.dumps(entries, separators=(",", ":")).encode()
    return head + b" " * (-len(head) % 8)


def _entry(tensor: TensorInfo, shift: int) -> dict[str, object]:
    offsets = [tensor.start + shift, tensor.stop + shift]
    return {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
