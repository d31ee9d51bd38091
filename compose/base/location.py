"""Where a base lies on disk: ``builtin:`` names, directories, and Hugging Face ids. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from hub.errors import GateError, NotFound, StoreError, UsageError, suggest

BUILTIN = "builtin:"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?(?:@[\w./-]+)?\Z")
# What a base is made of. Pickles (*.bin, *.pt) are never downloaded.
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")


@dataclass(frozen=True)
class Location:
    """A base on disk: its ``name`` for manifests, its directory, and the commit it is from, where known."""

    name: str
    directory: Path
    revision: str | None = None


def builtins() -> Mapping[str, Path]:
    """The bases shipped with the package: name -> directory."""
    root = resources.files("compose") / "base" / "builtin"
    if not isinstance(root, Path):
        raise StoreError("the built-in bases cannot be read from inside a zip file", hint="install moduloom unpacked")
    return {path.parent.name.replace("_", "-"): path.parent for path in sorted(root.glob("*/config.json"))}


def locate(base: str | Path, *, offline: bool = False, files: Sequence[str] = _WANTED) -> Location:
    """Find a base: ``builtin:tiny-lm``, a directory, or ``org/name[@revision]`` of the Hugging Face Hub.

    A Hugging Face id is downloaded into the ordinary Hugging Face cache (only its configuration, tokenizer and
    safetensors), or taken from it with ``offline`` or HF_HUB_OFFLINE=1; ``files`` are the patterns of
    what is wanted. The other forms never touch the network.

    Raises
    ------
    NotFound
        With the next command.
    GateError
        The base has pickled weights only, or is an adapter.
    """
    text = str(base)
    if text.startswith(BUILTIN):
        location = _builtin(text)
    elif Path(text).expanduser().is_dir():
        directory = Path(text).expanduser()
        location = _from_cache(directory) or Location(directory.resolve().name or text, directory)
    elif isinstance(base, Path) or text.startswith((".", "~", "/")) or not _REPO.match(text):
        raise NotFound(
            f"there is no base at {text!r}",
            path=text,
            hint="give builtin:tiny-lm, a model directory, or a Hugging Face id org/name",
        )
    else:
        location = _from_hub(text, files, offline=offline)
    _check(location)
    return location


def _builtin(text: str) -> Location:
    known = builtins()
    name = text.removeprefix(BUILTIN)
    if name not in known:
        near = suggest(name, known)
        raise NotFound(
            f"there is no built-in base {name!r}" + (f"; {near}" if near else ""),
            hint="built-in bases: " + ", ".join(BUILTIN + known_name for known_name in known),
        )
    return Location(text, known[name])


def _from_cache(directory: Path) -> Location | None:
    """Read repo and commit off the path of a snapshot in the Hugging Face cache."""
    parts = directory.resolve().parts
    if len(parts) < 3 or parts[-2] != "snapshots" or not parts[-3].startswith("models--"):
        return None
    return Location(parts[-3].removeprefix("models--").replace("--", "/"), directory, parts[-1])


def _from_hub(text: str, files: Sequence[str], *, offline: bool) -> Location:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    name, _, revision = text.partition("@")
    try:
        path = snapshot_download(
            name, revision=revision or None, allow_patterns=list(files), ignore_patterns="*/*", local_files_only=offline
        )
    except HFValidationError as error:
        raise UsageError(f"{name!r} is neither a directory nor a Hugging Face id: {error}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise NotFound(
            f"base {text!r} is no directory here, and not in the Hugging Face cache; the Hub cannot be reached",
            hint=f"with a network: hf download {name}; without: --base builtin:tiny-lm, or a model directory",
        ) from error
    except HfHubHTTPError as error:
        raise NotFound(
            f"the Hugging Face Hub does not give {text!r}: {str(error).splitlines()[0]}",
            hint="check the name; for a gated or private model: hf auth login",
        ) from error
    return _from_cache(Path(path)) or Location(name, Path(path))


def _check(location: Location) -> None:
    directory = location.directory
    if (directory / "config.json").is_file():
        return
    if (directory / "adapter_config.json").is_file():
        raise GateError(
            f"{directory} holds an adapter, not a base model",
            path=directory,
            hint=f'give it as the adapter: compose.load(base, "a", adapters={{"a": "{directory}"}})',
        )
    raise NotFound(
        f"{directory} has no config.json: it is no transformers model",
        path=directory,
        hint="save one there with model.save_pretrained(directory)",
    )


def weight_files(directory: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a base: one, or the shards that its index names, sorted.

    Raises
    ------
    GateError
        The weights are pickled, or the index names a file outside the directory.
    NotFound
        There are no weights, or a shard is missing.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return (single,)
    if not index.is_file():
        raise _no_weights(directory)
    return tuple(_shard(directory, name) for name in _shard_names(index))


def _shard_names(index: Path) -> list[str]:
    from hub.io.canonical_json import loads

    table = loads(index.read_bytes(), what=str(index))
    names = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise GateError(f"{index} has no weight_map of tensor names to files", path=index)
    return sorted(set(names.values()))


def _shard(directory: Path, name: str) -> Path:
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise GateError(
            f"the index of {directory} names {name!r}, which is no safetensors file beside it", path=directory
        )
    if not (directory / name).is_file():
        raise NotFound(f"{directory} lacks {name}, which its index names", path=directory, hint="download it again")
    return directory / name


def _no_weights(directory: Path) -> GateError | NotFound:
    pickled = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        return GateError(
            f"{directory} has pickled weights only ({pickled[0]}); loading a pickle can run any code, so it is refused",
            path=directory,
            hint="convert it where you trust it: AutoModel.from_pretrained(dir).save_pretrained(dir)",
        )
    return NotFound(
        f"{directory} has no model.safetensors (pickled weights are never downloaded)",
        path=directory,
        hint="model.save_pretrained(directory) writes it",
    )
