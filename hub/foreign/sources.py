"""Where a foreign adapter comes from: a directory, or a repository of the Hugging Face Hub, and what is taken of it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hub.contents.checks import CONFIG, EXTRA, TOKENIZER, WEIGHTS
from hub.errors import GateError, IntegrityError, NotFound, RemoteError, UsageError
from hub.foreign import shards
from hub.io.files import sha256_file

HF = "hf://"
CARD = "README.md"
_OWN = (CONFIG, WEIGHTS, EXTRA, CARD, "adapter.safetensors", "head_config.json", "model_head.safetensors")
_TAKEN = (*_OWN, *TOKENIZER)
_REPO = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?\Z")
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
MAX_BYTES = 2**40  # of one file of a repository


@dataclass(frozen=True)
class ForeignAdapter:
    """A foreign adapter on disk.

    Attributes
    ----------
    directory
        Holds its config and weights.
    origin
        ``hf://owner/name@commit`` with the whole commit, or None for a directory of this machine.
    tokenizer
        Names of the files of its tokenizer and chat template.
    left
        Names of the files that are not taken: optimizer states, pickles, and folders with adapters of their own.
    """

    directory: Path
    origin: str | None = None
    tokenizer: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


def find(source: str, room: Path, *, subfolder: str | None = None) -> ForeignAdapter:
    """Find an adapter; what is taken of a repository is downloaded first.

    Parameters
    ----------
    source
        A directory, or ``hf://owner/name[@revision]``.
    room
        An empty directory for what is downloaded.
    subfolder
        Where PEFT has put an adapter that is not called ``default``; needed where there are several.

    Raises
    ------
    NotFound, UsageError
        Nothing is there, or several adapters are.
    IntegrityError
        The Hub sent other bytes than it has listed.
    """
    if source.startswith(HF):
        return _from_hub(source, room, subfolder)
    directory = Path(source).expanduser()
    names = _names(source)
    inside = _choose(names, subfolder, source)
    here = _here(names, inside)
    for file in (*_TAKEN, *(name for name in here if name.endswith(".safetensors"))):
        if (directory / inside / file).is_symlink():  # it could lead to anything on this machine
            raise GateError(
                f"{inside}/{file} of {source} is a symbolic link; adapters are plain files".removeprefix("./"),
                path=directory / inside / file,
                hint="of the Hugging Face cache: hf download OWNER/NAME --local-dir DIR, or hub import hf://OWNER/NAME",
            )
    return _found(directory / inside, None, names, inside, room)


def folders(source: str) -> list[str]:
    """Folders of a source that hold an adapter each; ``.`` is the source itself.

    Raises
    ------
    NotFound, UsageError
        Nothing is there.
    """
    names = _names(source) if not source.startswith(HF) else list(_files(_info(source)))
    return _with_config(names)


def _with_config(names: Iterable[str]) -> list[str]:
    return sorted(str(PurePosixPath(name).parent) for name in names if PurePosixPath(name).name == CONFIG)


def _names(source: str) -> list[str]:
    """Files of a directory and of the folders in it."""
    directory = Path(source).expanduser()
    if not directory.is_dir():
        raise NotFound(
            f"{source} is neither a directory nor hf://owner/name",
            path=source,
            hint="check the path; `hub pull REF --from URL` brings published artifacts",
        )
    paths = [path for pattern in ("*", "*/*") for path in directory.glob(pattern) if path.is_file()]
    return [path.relative_to(directory).as_posix() for path in paths]


def _choose(names: list[str], subfolder: str | None, source: str) -> str:
    """Folder of the adapter within the source: the one asked for, the top, or the only one that holds a config."""
    known = _with_config(names)
    if subfolder is not None:
        if subfolder in known:
            return subfolder
        raise NotFound(f"{source} has no adapter in {subfolder}", path=source, hint=f"there are {', '.join(known)}")
    if "." in known or len(known) == 1:
        return "." if "." in known else known[0]
    if known:
        raise UsageError(
            f"{source} holds {len(known)} adapters: {', '.join(known)}",
            hint=f"say which, --subfolder {known[0]}, or --each for one artifact each",
        )
    pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    raise NotFound(
        f"{source} is no adapter: it has no {CONFIG}",
        path=source,
        hint=f"it holds {pickles[0]}: is it a model rather than an adapter?" if pickles else "check the name",
    )


def _here(names: list[str], inside: str) -> set[str]:
    """Names of the files of one folder."""
    return {PurePosixPath(name).name for name in names if str(PurePosixPath(name).parent) == inside}


def _found(directory: Path, origin: str | None, names: list[str], inside: str, room: Path) -> ForeignAdapter:
    """The adapter of a directory; weights in several files are joined in the room, where the source is not touched."""
    here, parts = _here(names, inside), set[str]()
    if WEIGHTS not in here and shards.INDEX in here:
        parts = {shards.INDEX, *shards.shards(directory / shards.INDEX)}
        joined = room / "joined"
        joined.mkdir()
        shards.join(directory / shards.INDEX, joined / WEIGHTS)
        for name in sorted(here.intersection(_TAKEN)):
            shutil.copyfile(directory / name, joined / name)
        directory = joined
    others = {f"{folder}/" for folder in _with_config(names) if folder != inside}
    left = {name for name in here if name not in _TAKEN and name not in parts and not name.startswith(".")}
    return ForeignAdapter(
        directory, origin, tuple(name for name in TOKENIZER if name in here), tuple(sorted(left | others))
    )


def _info(source: str) -> Any:
    """What the Hub says of a repository, with the commit that it stands at."""
    from huggingface_hub import HfApi

    match = _REPO.match(source.removeprefix(HF))
    if match is None:
        raise UsageError(f"{source} names no repository", hint="write hf://owner/name or hf://owner/name@revision")
    with _translated(source):
        info = HfApi(library_name="moduloom").model_info(match["name"], revision=match["revision"], files_metadata=True)
    if not _COMMIT.match(str(info.sha)):
        raise RemoteError(f"the Hub names no commit of {match['name']}, so what it sends cannot be recorded")
    return info


def _files(info: Any) -> dict[str, Any]:
    return {sibling.rfilename: sibling for sibling in info.siblings or ()}


def _from_hub(source: str, room: Path, subfolder: str | None) -> ForeignAdapter:
    info = _info(source)
    name = source.removeprefix(HF).partition("@")[0]
    siblings = _files(info)
    inside = _choose(list(siblings), subfolder, source)
    here = _here(list(siblings), inside)

    def fetch(file: str) -> None:
        from huggingface_hub import hf_hub_download

        path = file if inside == "." else f"{inside}/{file}"
        sibling = siblings.get(path)
        if sibling is None:
            raise NotFound(f"{source} has no {path}", path=path, hint="the repository is not whole: ask its owner")
        if (sibling.size or 0) > MAX_BYTES:
            raise GateError(f"{source} lists {path} with {sibling.size} bytes", path=path)
        with _translated(source):
            arrived = Path(hf_hub_download(name, path, revision=info.sha, local_dir=room / "hub"))
        _check(arrived, path, sibling.lfs.sha256 if sibling.lfs else None, source)

    for file in sorted(here.intersection(_TAKEN)):
        fetch(file)
    if WEIGHTS not in here and shards.INDEX in here:
        fetch(shards.INDEX)
        for file in shards.shards(room / "hub" / inside / shards.INDEX):
            fetch(file)
    return _found(room / "hub" / inside, f"{HF}{name}@{info.sha}", list(siblings), inside, room)


def _check(path: Path, name: str, sha256: str | None, source: str) -> None:
    """Compare a file with the digest that the Hub lists for it, which its client does not do."""
    if sha256 is not None and sha256_file(path)[0] != sha256:
        raise IntegrityError(
            f"{name} of {source} is not the file that the Hub lists ({sha256[:16]}...)", path=name, hint="import again"
        )


@contextmanager
def _translated(source: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    from hub.clients.huggingface import transport_error

    try:
        yield
    except HFValidationError as error:
        raise UsageError(f"{source} names no repository: {error}") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise _unreachable(source, error) from error
    except HfHubHTTPError as error:
        raise RemoteError(
            f"the Hub does not give {source}: {str(error).splitlines()[0]}",
            hint="check the name and the revision; for a private one: hf auth login",
        ) from error
    except transport_error() as error:
        raise _unreachable(source, error) from error


def _unreachable(source: str, error: Exception) -> RemoteError:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    hint = "with a network and without HF_HUB_OFFLINE; or download it and give the directory"
    return RemoteError(f"{source} cannot be reached: {first}", hint=hint)
