"""Object stores by way of fsspec: S3, Google Cloud Storage, Azure, and memory.

Layout below the URL: ``blobs/sha256/<hex>`` as in a store, and for each name a log of one object an event,
``log/<ns>/<name>/<seq>.json``; signatures are ``signatures/<hex>/<key>.json``. An object store cannot append to a file,
but it can create an object only where there is none: of two writers one gets the next number, and the other reads again
and decides anew. Each event names the hash of the one before it, as the log of a store does.
"""

from __future__ import annotations

import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hub.errors import Conflict, HubError, IntegrityError, NotFound, RemoteError, UsageError
from hub.io import canonical_json as canonical
from hub.io.files import CHUNK
from hub.ref import AdapterRef, check_digest, name_key
from hub.remotes.base import REMOTES, no_privacy
from hub.storage.ledger import GENESIS, Event, Position, event_of, line_of, load_line
from hub.storage.releases import Catalogue, refuse_aliased, refuse_conflict
from hub.storage.signatures import MAX_KEYS, MAX_SIGNATURE, names_key
from hub.storage.staging import Advance

if TYPE_CHECKING:
    from hub.manifest import FileEntry, Manifest

_creating = threading.Lock()  # memory:// looks and writes in two steps
_WORKERS = 8  # blobs looked up at a time
_AHEAD = 4  # ranges of one blob that are asked for at once
_TRIES = 20  # events of others that may come between ours and the log we saw
_MAX_EVENT = 2**16  # bytes
_EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure"}  # scheme -> extra that brings it
_ABSENT = {"az": {"overwrite": False}, "abfs": {"overwrite": False}}  # "only where there is none", as a client says it
# What a client raises that is no OSError; looked up where it is loaded, so that none is imported for its errors.
_FAILURES = {
    "botocore.exceptions": "BotoCoreError",
    "aiohttp": "ClientError",
    "google.auth.exceptions": "GoogleAuthError",
    "gcsfs.retry": "HttpError",
    "azure.core.exceptions": "AzureError",
}


@REMOTES.register("s3", "gs", "gcs", "az", "abfs", "memory")
class FsspecRemote:
    """A bucket, or a folder of one.

    Parameters
    ----------
    url
        ``s3://bucket/folder``, ``gs://...``, ``az://container/...`` or ``memory://...`` (gone with the process).

    Notes
    -----
    Credentials and endpoints are those of the client: ``AWS_PROFILE``, ``AWS_ENDPOINT_URL``,
    ``GOOGLE_APPLICATION_CREDENTIALS``, ``AZURE_STORAGE_CONNECTION_STRING`` and so on.
    """

    checks_uploads = False  # an object store does not know our digests

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.scheme = url.partition("://")[0].lower()
        if not url.partition("://")[2].strip("/"):
            raise UsageError(
                f"{url} names no bucket", hint=f"write {self.scheme}://bucket or {self.scheme}://bucket/folder"
            )
        self._logs: dict[str, list[bytes]] = {}  # events never change, so each is read once

    @cached_property
    def _place(self) -> tuple[Any, str]:
        """The file system and the path of the URL in it."""
        try:
            import fsspec

            # Other writers change the bucket all the time: nothing that was listed before may be believed.
            fs, path = fsspec.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            extra = _EXTRAS.get(self.scheme, "s3")
            raise UsageError(
                f"{self.scheme}:// needs a package that is not installed: {error}",
                hint=f'pip install "moduloom[{extra}]"',
            ) from error
        except ValueError as error:
            raise UsageError(f"{self.url} cannot be opened: {error}") from error
        return fs, path.rstrip("/")

    def keep_private(self) -> None:
        """Refuse."""
        raise no_privacy(self.url, "the bucket's policy says who may read it")

    def names(self) -> list[str]:
        """All names that have a log, in small letters: that is what the folders are called."""
        spaces = self._list("log")
        return sorted(f"{space}/{name}" for space in spaces for name in self._list(f"log/{space}"))

    def catalogue(self, name: str) -> Catalogue:
        """Replay the log of a name."""
        AdapterRef.parse(name)  # before it meets a path
        return Catalogue.fold(name, [event_of(load_line(line, what=self.url)) for line in self._log(name)])

    def manifest(self, name: str, digest: str) -> bytes:
        """Read the manifest's blob; more than a manifest may have is not read."""
        fs, _ = self._place
        with self._translated(f"the manifest {digest[:19]}...", digest):
            data: bytes = fs.cat_file(self._blob(digest), start=0, end=canonical.MAX_JSON + 1)
        return data

    def missing(self, manifest: Manifest) -> list[FileEntry]:
        """Files whose blob is not here, or has another size."""
        with ThreadPoolExecutor(_WORKERS) as pool:
            sizes = pool.map(lambda entry: self._size(entry.digest), manifest.files)
            return [entry for entry, size in zip(manifest.files, sizes, strict=True) if size != entry.size]

    def read(self, manifest: Manifest, entry: FileEntry, offset: int) -> Iterable[bytes]:
        """Bytes of the blob from the offset on: ranges, of which the next few are on their way already."""
        fs, _ = self._place
        path, pool, coming = self._blob(entry.digest), ThreadPoolExecutor(_AHEAD), deque[Future[bytes]]()
        with self._translated(f"{entry.path} of {manifest.ref}", entry.digest):
            try:
                size = int(fs.info(path)["size"])
                for start in range(offset, size, CHUNK):
                    coming.append(pool.submit(fs.cat_file, path, start=start, end=min(start + CHUNK, size)))
                    if len(coming) == _AHEAD:
                        yield coming.popleft().result()
                while coming:
                    yield coming.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def write(self, manifest: Manifest, entry: FileEntry, source: Path, advance: Advance) -> None:
        """Send one blob; an object appears when it is whole, or not at all."""
        from fsspec.callbacks import Callback

        reported = 0

        def tell(_size: int, value: int, **_: object) -> None:
            nonlocal reported
            advance(value - reported)
            reported = value

        fs, _ = self._place
        with self._translated(f"{entry.path} of {manifest.ref}"):
            if self.scheme == "memory":  # a file that grows there can be seen by other threads
                fs.pipe_file(self._blob(entry.digest), source.read_bytes())
                advance(entry.size)
            else:
                fs.put_file(str(source), self._blob(entry.digest), callback=Callback(hooks={"told": tell}))

    def publish(self, manifest: Manifest) -> bool:
        """Write the manifest's blob, then the event that makes it visible."""
        refuse_conflict(manifest.ref, manifest.digest, self.catalogue(manifest.name), where=self.url)
        if lacks := [entry.path for entry in self.missing(manifest)]:
            raise IntegrityError(f"{self.url} lacks {', '.join(lacks[:5])} of {manifest.ref}", ref=manifest.ref)
        fs, _ = self._place
        with self._translated(str(manifest.ref)):
            fs.pipe_file(self._blob(manifest.digest), manifest.canonical)

        def decide(catalogue: Catalogue) -> Event | None:
            if refuse_conflict(manifest.ref, manifest.digest, catalogue, where=self.url):
                return None
            return Event("publish", manifest.name, manifest.digest, version=manifest.version)

        return self._append(manifest.name, decide)

    def tag(self, name: str, alias: str, digest: str) -> None:
        """Move the alias by one more event."""

        def decide(catalogue: Catalogue) -> Event | None:
            catalogue.release(digest, where=self.url)
            same = catalogue.aliases.get(alias) == digest
            return None if same else Event("alias", name, digest, alias=alias)

        self._append(name, decide)

    def yank(self, name: str, digest: str, reason: str | None) -> None:
        """Yank a release, or take that back, by one more event."""

        def decide(catalogue: Catalogue) -> Event | None:
            release = catalogue.release(digest, where=self.url)
            if release.yanked == reason:
                return None
            return Event("unyank" if reason is None else "yank", name, digest, version=release.version, reason=reason)

        self._append(name, decide)

    def delete(self, name: str, digest: str, reason: str) -> None:
        """Delete a release by one more event; its blobs stay, since another name may share them."""

        def decide(catalogue: Catalogue) -> Event:
            release = catalogue.release(digest, where=self.url)
            refuse_aliased(catalogue, release, where=self.url)
            return Event("delete", name, digest, version=release.version, reason=reason)

        self._append(name, decide)

    def signatures(self, name: str, digest: str) -> dict[str, bytes]:
        """Read the objects below the digest, but none that is too large."""
        fs, _ = self._place
        keys = [file.removesuffix(".json") for file in self._list(self._signed(digest))]
        with self._translated(f"the signatures of {name}"):
            return {
                key: fs.cat_file(f"{self._place[1]}/{self._signed(digest)}/{key}.json", start=0, end=MAX_SIGNATURE + 1)
                for key in [key for key in keys if names_key(key)][:MAX_KEYS]
            }

    def sign(self, name: str, digest: str, signatures: Mapping[str, bytes]) -> None:
        """Write an object for each."""
        fs, _ = self._place
        with self._translated(f"the signatures of {name}"):
            for key, data in signatures.items():
                fs.pipe_file(f"{self._place[1]}/{self._signed(digest)}/{key}.json", data)

    @staticmethod
    def _signed(digest: str) -> str:
        return f"signatures/{check_digest(digest).removeprefix('sha256:')}"

    def _append(self, name: str, decide: Callable[[Catalogue], Event | None]) -> bool:
        """Add the event that `decide` makes of the catalogue as it is; whether there was one to add."""
        for tried in range(_TRIES):
            event = decide(self.catalogue(name))
            if event is None:
                return False
            lines = self._logs[name_key(name)]
            line = line_of(event, Position(seq=len(lines), head=canonical.digest(lines[-1]) if lines else GENESIS))
            if self._create(self._event_path(name, len(lines) + 1), line):
                return True
            time.sleep(tried * secrets.randbelow(50) / 1000)  # others publish, too
        raise Conflict(
            f"{self.url} is written to by others all the time: {name} could not be changed", hint="try again"
        )

    def _create(self, path: str, data: bytes) -> bool:
        """Create an object where there is none; False where somebody was faster."""
        fs, _ = self._place
        try:
            with _creating, self._translated(path):
                fs.pipe_file(path, data, **_ABSENT.get(self.scheme, {"mode": "create"}))
        except RemoteError:
            with self._translated(path):
                if not fs.exists(path):
                    raise
        with self._translated(path):  # some servers ignore the condition: the bytes say who has won
            return bool(fs.cat_file(path) == data)

    def _log(self, name: str) -> list[bytes]:
        """Events of a name as they were written, each checked against the one before it."""
        fs, _ = self._place
        known = self._logs.get(name_key(name), [])
        names = self._list(f"log/{name_key(name)}")
        expected = [self._event_name(seq + 1) for seq in range(len(names))]
        if names != expected:
            odd = next((a or b for a, b in zip(names, expected, strict=True) if a != b), name)
            raise IntegrityError(f"the log of {name} in {self.url} has a gap at {odd}", hint="restore the object")
        wanted = [self._event_path(name, seq + 1) for seq in range(len(known), len(names))]
        with self._translated(f"the log of {name}"):
            read: dict[str, bytes] = fs.cat(wanted) if wanted else {}
        lines = self._chain(name, known, [read[path] for path in sorted(read)])
        self._logs[name_key(name)] = lines
        return lines

    def _chain(self, name: str, known: list[bytes], new: list[bytes]) -> list[bytes]:
        lines = list(known)
        for line in new:
            value = load_line(line[:_MAX_EVENT], what=self.url)
            head = canonical.digest(lines[-1]) if lines else GENESIS
            about = name_key(value["name"])
            if (value.get("prev"), value.get("seq"), about) != (head, len(lines) + 1, name_key(name)):
                raise IntegrityError(
                    f"the log of {name} in {self.url} does not chain at event {len(lines) + 1}",
                    hint="restore the object from a backup, or publish to a new folder",
                )
            lines.append(line)
        return lines

    def _list(self, folder: str) -> list[str]:
        """Names directly below a folder, sorted; none where there is no such folder."""
        fs, path = self._place
        with self._translated(folder):
            try:
                paths = fs.ls(f"{path}/{folder}", detail=False)
            except FileNotFoundError:
                return []
        names = (entry.rstrip("/").rpartition("/")[2] for entry in paths)
        return sorted(name for name in names if name and name != folder.rpartition("/")[2])

    def _size(self, digest: str) -> int | None:
        fs, _ = self._place
        with self._translated(digest):
            try:
                return int(fs.info(self._blob(digest))["size"])
            except FileNotFoundError:
                return None

    def _blob(self, digest: str) -> str:
        return f"{self._place[1]}/blobs/sha256/{check_digest(digest).removeprefix('sha256:')}"

    def _event_path(self, name: str, seq: int) -> str:
        return f"{self._place[1]}/log/{name_key(name)}/{self._event_name(seq)}"

    @staticmethod
    def _event_name(seq: int) -> str:
        return f"{seq:08d}.json"

    @contextmanager
    def _translated(self, about: str, digest: str | None = None) -> Iterator[None]:
        """Turn what the clients raise into errors that say what to do."""
        try:
            yield
        except HubError:
            raise
        except FileNotFoundError as error:
            hint = "push it there again" if digest else f"is there such a bucket? {self.url} must exist"
            raise NotFound(f"{self.url} has no {about}", digest=digest, hint=hint) from error
        except PermissionError as error:
            hint = "check the credentials of this client (environment, profile, role)"
            raise RemoteError(f"{self.url} refuses {about}: {_first_line(error)}", hint=hint) from error
        except _failures() as error:
            hint = "check the network, the endpoint and the credentials of this client"
            raise RemoteError(f"{self.url} cannot be used for {about}: {_first_line(error)}", hint=hint) from error


def _failures() -> tuple[type[Exception], ...]:
    """What an operation may raise: OSError, and the errors of the clients that are loaded."""
    loaded = (getattr(sys.modules[module], name) for module, name in _FAILURES.items() if module in sys.modules)
    return (OSError, *loaded)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
