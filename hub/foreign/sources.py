"""Where a foreign adapter comes from: a directory, or a repository of the Hugging Face Hub, and what is taken of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hub.contents.checks import CONFIG, EXTRA, WEIGHTS
from hub.errors import GateError, IntegrityError, NotFound, RemoteError, UsageError
from hub.io.files import sha256_file

HF = "hf://"
CARD = "README.md"
_TAKEN = (CONFIG, WEIGHTS, EXTRA, CARD, "adapter.safetensors", "head_config.json", "model_head.safetensors")
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
    left
        Names of the files that are not taken: tokenizers, optimizer states, pickles.
    """

    directory: Path
    origin: str | None = None
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
    if not directory.is_dir():
        raise NotFound(
            f"{source} is neither a directory nor hf://owner/name",
            path=source,
            hint="check the path; `hub pull REF --from URL` brings published artifacts",
        )
    names = [path.relative_to(directory).as_posix() for path in directory.glob("*") if path.is_file()]
    names += [path.relative_to(directory).as_posix() for path in directory.glob("*/*") if path.is_file()]
    inside = _choose(names, subfolder, source)
    for file in _TAKEN:
        if (directory / inside / file).is_symlink():  # it could lead to anything on this machine
            raise GateError(
                f"{inside}/{file} of {source} is a symbolic link; adapters are plain files".removeprefix("./"),
                path=directory / inside / file,
                hint="of the Hugging Face cache: hf download OWNER/NAME --local-dir DIR, or hub import hf://OWNER/NAME",
            )
    return ForeignAdapter(directory / inside, None, _left(names, inside))


def _choose(names: list[str], subfolder: str | None, source: str) -> str:
    """Folder of the adapter within the source: the one asked for, the top, or the only one that holds a config."""
    folders = sorted(str(PurePosixPath(name).parent) for name in names if PurePosixPath(name).name == CONFIG)
    if subfolder is not None:
        if subfolder in folders:
            return subfolder
        raise NotFound(f"{source} has no adapter in {subfolder}", path=source, hint=f"there are {', '.join(folders)}")
    if "." in folders or len(folders) == 1:
        return "." if "." in folders else folders[0]
    if folders:
        raise UsageError(
            f"{source} holds {len(folders)} adapters: {', '.join(folders)}", hint=f"add --subfolder {folders[0]}"
        )
    pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    raise NotFound(
        f"{source} is no adapter: it has no {CONFIG}",
        path=source,
        hint=f"it holds {pickles[0]}: is it a model rather than an adapter?" if pickles else "check the name",
    )


def _left(names: list[str], inside: str) -> tuple[str, ...]:
    """Files beside those that are taken, hidden ones not counted."""
    here = [PurePosixPath(name) for name in names]
    mine = [path.name for path in here if str(path.parent) == inside]
    return tuple(sorted(name for name in mine if name not in _TAKEN and not name.startswith(".")))


def _from_hub(source: str, room: Path, subfolder: str | None) -> ForeignAdapter:
    from huggingface_hub import HfApi, hf_hub_download

    match = _REPO.match(source.removeprefix(HF))
    if match is None:
        raise UsageError(f"{source} names no repository", hint="write hf://owner/name or hf://owner/name@revision")
    name, revision = match["name"], match["revision"]
    with _translated(source):
        info = HfApi(library_name="moduloom").model_info(name, revision=revision, files_metadata=True)
    if not _COMMIT.match(str(info.sha)):
        raise RemoteError(f"the Hub names no commit of {name}, so what it sends cannot be recorded", ref=name)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    inside = _choose(list(siblings), subfolder, source)
    for file in _TAKEN:
        path = file if inside == "." else f"{inside}/{file}"
        sibling = siblings.get(path)
        if sibling is None:
            continue
        if (sibling.size or 0) > MAX_BYTES:
            raise GateError(f"{source} lists {path} with {sibling.size} bytes", path=path)
        with _translated(source):
            here = Path(hf_hub_download(name, path, revision=info.sha, local_dir=room))
        _check(here, path, sibling.lfs.sha256 if sibling.lfs else None, source)
    return ForeignAdapter(room / inside, f"{HF}{name}@{info.sha}", _left(list(siblings), inside))


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
