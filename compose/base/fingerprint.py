"""Identity of a base: digests of its unquantized weights tensor by tensor, its config and its tokenizer.

A tensor's digest is the first 16 hex of sha256("<dtype>|<d0>x<d1>...|" + raw little-endian bytes), with safetensors'
dtype names. Files are streamed, never loaded as a model, and the digests are kept under the store's home, keyed by the
file's path, size and times. Imports torch only for models in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.base.location import BUILTIN, Location, weight_files
from hub.contents.tensor_files import TensorInfo, read_header
from hub.errors import GateError, IntegrityError, ManifestError
from hub.io.canonical_json import digest, dumps, loads
from hub.io.files import CHUNK, atomic_write, read_capped, sha256_file
from hub.manifest import BaseIdentity, weights_fingerprint
from hub.project.known_bases import KnownBases

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ADAPTERS = "moduloom_adapters"  # attribute of a model that holds its adapters as modules
_SHOW_PROGRESS = 2 * 2**30  # bytes; below, hashing takes a second or two
_MAX_CACHE = 64 * 2**20  # bytes
# Written by whichever version or call saved the model; they do not change what it computes.
_VOLATILE = frozenset(
    ("transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "quantization_config")
)
_VOCABULARY = ("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")


@dataclass(frozen=True, slots=True)
class Print:
    """Fingerprint of one tensor: 16 hex digits, and its shape."""

    hex16: str
    shape: tuple[int, ...]


def directory_identity(where: Location) -> BaseIdentity:
    """Identity of a base on disk; where a plain directory lies is remembered (`hub.project.known_bases`).

    Raises
    ------
    GateError, IntegrityError, NotFound
        Pickled, broken or missing weights, named.
    """
    config = _json(where.directory / "config.json")
    architectures = config.get("architectures") or []
    identity = _identity(
        _file_prints(weight_files(where.directory)),
        config,
        [str(name) for name in architectures],
        repo=where.name,
        revision=where.revision,
        directory=where.directory,
    )
    if where.revision is None and not where.name.startswith(BUILTIN):  # the others are found by their names
        KnownBases().remember(identity.weights_fingerprint, where.directory)
    return identity


def model_identity(model: PreTrainedModel, *, repo: str) -> BaseIdentity:
    """Identity of an unquantized model in memory, equal to that of the directory ``save_pretrained`` would write."""
    config = json.loads(model.config.to_json_string())
    prints = {name: _tensor_print(tensor) for name, tensor in base_tensors(model).items()}
    return _identity(prints, config, [type(model).__name__], repo=repo, revision=None, directory=None)


def base_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Tensors of the base alone, named as ``save_pretrained`` names them: no adapters, tied ones once."""
    from transformers.core_model_loading import revert_weight_conversion

    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    named = model.state_dict(keep_vars=True).items()
    plain = {n: t.detach() for n, t in named if n not in tied and not _is_adapters(n)}
    return dict(revert_weight_conversion(model, plain))


def _identity(
    prints: Mapping[str, Print],
    config: Mapping[str, Any],
    architectures: Iterable[str],
    *,
    repo: str,
    revision: str | None,
    directory: Path | None,
) -> BaseIdentity:
    weights = {name: found.hex16 for name, found in prints.items()}
    shapes = sorted([name, list(found.shape)] for name, found in prints.items())
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    return BaseIdentity(
        repo=repo,
        revision=revision,
        arch_digest=digest(dumps({"architectures": sorted(architectures), "tensors": shapes})),
        weights_fingerprint=weights_fingerprint(weights),
        weights=weights,
        config_digest=_config_digest(config),
        tokenizer_digest=directory and _tokenizer_digest(directory),
        chat_template_digest=directory and _chat_template_digest(directory),
        vocab_size=int((text or config).get("vocab_size") or 0),
    )


def config_digest(directory: Path) -> str:
    """Digest of a base's config.json without what changes from save to save. Raises ManifestError."""
    return _config_digest(_json(directory / "config.json"))


def _config_digest(config: Mapping[str, Any]) -> str:
    lasting = {k: v for k, v in config.items() if k not in _VOLATILE and not k.startswith("_")}
    return digest(json.dumps(lasting, sort_keys=True).encode())


# -- files ---------------------------------------------------------------------------------------------------------


def _file_prints(files: Iterable[Path]) -> dict[str, Print]:
    found: dict[str, Print] = {}
    for file in files:
        path = file.resolve()  # the Hugging Face cache holds links to its blobs
        prints = _cached(path) or _hashed(path)
        if twice := found.keys() & prints.keys():
            raise IntegrityError(f"tensor {min(twice)!r} is in two files of {file.parent}", path=file)
        found.update(prints)
    return {name: value for name, value in found.items() if not _is_adapters(name)}


def _is_adapters(name: str) -> bool:
    """Whether a tensor is of an adapter in training, as in checkpoints of a model that learns one."""
    return name.startswith(ADAPTERS + ".")


def _hashed(path: Path) -> dict[str, Print]:
    stamp = _stamp(path)
    infos = read_header(path).tensors
    total = infos[-1].stop if infos else 0
    workers = min(8, os.cpu_count() or 1) if total > _SHOW_PROGRESS else 1
    advance, close = _progress(path, total)
    try:
        with ThreadPoolExecutor(workers) as pool:  # hashlib lets go of the GIL
            digests = list(pool.map(lambda info: _hash_tensor(path, info, advance), infos))
    finally:
        close()
    prints = {info.name: Print(hex16, info.shape) for info, hex16 in zip(infos, digests, strict=True)}
    _remember(path, stamp, prints)
    return prints


def _hash_tensor(path: Path, info: TensorInfo, advance: Callable[[int], None]) -> str:
    hasher = hashlib.sha256(_preamble(info.dtype, info.shape))
    left = info.stop - info.start
    with path.open("rb") as file:
        file.seek(info.start)
        while left:
            data = file.read(min(left, CHUNK))
            if not data:
                raise IntegrityError(f"{path.name} ended while it was read", path=path)
            hasher.update(data)
            left -= len(data)
            advance(len(data))
    return hasher.hexdigest()[:16]


def _preamble(dtype: str, shape: Iterable[int]) -> bytes:
    return f"{dtype}|{'x'.join(map(str, shape))}|".encode()


def _progress(path: Path, total: int) -> tuple[Callable[[int], None], Callable[[], None]]:
    if total < _SHOW_PROGRESS:
        return (lambda _: None), (lambda: None)
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(f"fingerprint {path.name}", total=total)
    bar.start()
    return (lambda count: bar.advance(task, count)), bar.stop


def _stamp(path: Path) -> str:
    # The change time cannot be set back, so an edit that restores size and modification time still shows.
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _cache_file(path: Path) -> Path:
    from hub.store import default_root

    return default_root() / "cache" / "fingerprints" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"


def _cached(path: Path) -> dict[str, Print] | None:
    cache = _cache_file(path)
    if not cache.is_file():
        return None
    try:
        entry = loads(read_capped(cache, _MAX_CACHE), what=str(cache), limit=_MAX_CACHE)
        if entry["path"] != str(path) or entry["stamp"] != _stamp(path):
            return None
        return {name: Print(str(hex16), tuple(shape)) for name, (hex16, shape) in entry["tensors"].items()}
    except (ManifestError, GateError, KeyError, TypeError, ValueError, AttributeError):
        return None  # a damaged cache is only a slower start: the file is hashed again


def _remember(path: Path, stamp: str, prints: Mapping[str, Print]) -> None:
    cache = _cache_file(path)
    tensors = {name: [found.hex16, list(found.shape)] for name, found in prints.items()}
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(cache, dumps({"path": str(path), "stamp": stamp, "tensors": tensors}))
    except OSError:
        return  # a home that cannot be written (read-only, full) costs time, not correctness


# -- models in memory ----------------------------------------------------------------------------------------------


def _tensor_print(tensor: Tensor) -> Print:
    return Print(tensor_hex16(tensor), tuple(tensor.shape))


def tensor_hex16(tensor: Tensor) -> str:
    """Digest of a tensor in memory, as if it were stored by safetensors."""
    import torch

    dtype = _dtype_names().get(tensor.dtype)
    if dtype is None:
        raise GateError(f"a tensor of {tensor.dtype} has no safetensors form, so the model cannot be fingerprinted")
    if tensor.is_meta:
        raise GateError("a model on the meta device has no weights to fingerprint", hint="load it onto a real device")
    hasher = hashlib.sha256(_preamble(dtype, tensor.shape))
    hasher.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()[:16]


def _dtype_names() -> dict[Any, str]:
    import torch

    names = {torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.bool: "BOOL"}
    floats = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16"}
    integers = {torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8"}
    return {**names, **floats, **integers}


# -- config and tokenizer ------------------------------------------------------------------------------------------


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))  # not hub.io.canonical_json.loads: some configs hold Infinity
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path} is not JSON: {error}", path=path) from error
    if not isinstance(value, dict):
        raise ManifestError(f"{path} is not a JSON object", path=path)
    return value


def _tokenizer_digest(directory: Path) -> str | None:
    """Digest over the files that map text to token ids; tokenizer.json alone where there is one."""
    names = ("tokenizer.json",) if (directory / "tokenizer.json").is_file() else _VOCABULARY
    files = {name: sha256_file((directory / name).resolve())[0] for name in names if (directory / name).is_file()}
    return digest(dumps(files)) if files else None


def _chat_template_digest(directory: Path) -> str | None:
    template = directory / "chat_template.jinja"
    if template.is_file():
        return digest(template.read_bytes())
    settings = directory / "tokenizer_config.json"
    found = _json(settings).get("chat_template") if settings.is_file() else None
    return digest(dumps(found)) if found else None
