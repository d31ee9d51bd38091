"""Repositories of the Hugging Face Hub, or of anything that speaks its protocol, as a remote: public API only.

One repository holds one adapter, and a tag is a version: ``module.json`` at that tag is the manifest. Other tags on
the commit of a version are aliases. What was pulled once is in the client's cache and can be pulled again offline.
The client checks no hashes; here every byte is checked against the manifest, and a cached file that does not fit
is fetched anew.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from hub import canonical
from hub.errors import Conflict, HubError, IntegrityError, NotFound, RemoteError, UsageError
from hub.files import CHUNK, open_regular, read_capped, sha256_file
from hub.manifest import MANIFEST_NAME
from hub.ref import AdapterRef, check_name, check_version, names_adapter, names_alias, names_version, version_key
from hub.remotes.base import register
from hub.resolve import Catalogue, Release, refuse_conflict
from hub.staging import Advance

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from hub.manifest import FileEntry, Manifest

DEFAULT_ENDPOINT = "https://huggingface.co"
_WORKERS = 8  # manifests read at a time
_TRIES = 12  # commits that may come between ours and the head we saw
_YANKED = "yanked/"  # name of a ref that our own registry keeps for a yanked version, among the converts
_KEPT = frozenset({".gitattributes"})  # files that belong to the repository, not to the artifact


class _Tag(NamedTuple):
    name: str
    commit: str
    yanked: bool = False


@register("hf", "hf+http", "hf+https")
class HuggingFaceRemote:
    """The Hugging Face Hub, or a registry that speaks its protocol.

    Parameters
    ----------
    url
        ``hf://`` (the endpoint is ``HF_ENDPOINT``, or huggingface.co) or ``hf+https://host`` (that endpoint). A
        namespace behind it (``hf://acme``, ``hf+https://host/acme``) holds all adapters, whatever their own: then
        ``local/tone`` lives in ``acme/tone``.

    Notes
    -----
    Credentials are those of the client: ``HF_TOKEN``, or what ``hf auth login`` has stored.
    """

    checks_uploads = False  # the client hashes what it sends, and compares with nothing of ours

    def __init__(self, url: str) -> None:
        self.url = url
        self.endpoint, self.namespace = _parse(url)
        self._tags: dict[str, dict[str, _Tag]] = {}  # repository -> digest -> where it is
        self._staged: dict[str, dict[str, Path]] = {}  # digest -> path in the repository -> where its bytes are

    @cached_property
    def _api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, library_name="moduloom")

    def names(self) -> list[str]:
        """All names of the namespace, or of a registry of one's own; none where that would be the whole Hub."""
        if self.namespace is None and self.endpoint == DEFAULT_ENDPOINT:
            return []
        with self._translated("the list of repositories"):
            found = [model.id for model in self._api.list_models(author=self.namespace)]
        return sorted(name for name in found if names_adapter(name))

    def catalogue(self, name: str) -> Catalogue:
        """Versions and aliases of a repository, from its tags; from the client's cache where it is offline."""
        from huggingface_hub.errors import RepositoryNotFoundError

        repo = self._repo(name)
        try:
            with self._translated(repo):
                refs = self._api.list_repo_refs(repo)
        except _Offline as error:
            return self._cached(name, error)
        except RemoteError as error:
            if isinstance(error.__cause__, RepositoryNotFoundError):
                return Catalogue(name)
            raise
        tags = [_Tag(ref.name, ref.target_commit) for ref in refs.tags]
        hidden = [ref for ref in refs.converts if ref.name.startswith(_YANKED)]
        tags += [_Tag(ref.name.removeprefix(_YANKED), ref.target_commit, True) for ref in hidden]
        versions = [tag for tag in tags if names_version(tag.name)]
        with ThreadPoolExecutor(_WORKERS) as pool:
            digests = list(pool.map(lambda tag: self._digest(repo, tag), versions))
        return self._folded(name, tags, dict(zip(versions, digests, strict=True)))

    def _folded(self, name: str, tags: list[_Tag], digests: dict[_Tag, str | None]) -> Catalogue:
        places = {digest: tag for tag, digest in digests.items() if digest is not None}
        self._tags[self._repo(name)] = places
        reason = f"withdrawn in {self.url}"
        releases = [
            Release(check_version(tag.name), digest, reason if tag.yanked else None) for digest, tag in places.items()
        ]
        of_commit = {tag.commit: digest for digest, tag in places.items()}
        aliases = {tag.name: of_commit[tag.commit] for tag in tags if names_alias(tag.name) and tag.commit in of_commit}
        return Catalogue(name, tuple(sorted(releases, key=lambda release: version_key(release.version))), aliases)

    def _cached(self, name: str, reason: RemoteError) -> Catalogue:
        """Versions whose manifest is in the client's cache, which does not tell endpoints apart."""
        from huggingface_hub import constants, scan_cache_dir
        from huggingface_hub.errors import CacheNotFound

        repo = self._repo(name)
        tags: list[_Tag] = []
        digests: dict[_Tag, str | None] = {}
        try:
            repos = [found for found in scan_cache_dir(constants.HF_HUB_CACHE).repos if found.repo_id == repo]
        except CacheNotFound:
            repos = []
        for revision in (revision for found in repos for revision in found.revisions):
            manifest = next((file for file in revision.files if file.file_name == MANIFEST_NAME), None)
            data = read_capped(manifest.blob_path, canonical.MAX_JSON) if manifest else b""
            if manifest and _fits_name(data, manifest.blob_path.name):
                here = [_Tag(ref, revision.commit_hash) for ref in revision.refs]
                tags += here
                digests |= {tag: canonical.digest(data) for tag in here if names_version(tag.name)}
        if not digests:
            raise reason
        return self._folded(name, tags, digests)

    def _digest(self, repo: str, tag: _Tag) -> str | None:
        """Digest of the manifest at a tag; None where there is no manifest, so that this is no version of ours."""
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return canonical.digest(self._manifest_at(repo, tag))
        except RemoteError as error:
            if isinstance(error.__cause__, EntryNotFoundError):
                return None
            raise

    def manifest(self, name: str, digest: str) -> bytes:
        """Bytes of ``module.json`` at the tag of that version."""
        return self._manifest_at(self._repo(name), self._place(name, digest))

    def _manifest_at(self, repo: str, tag: _Tag) -> bytes:
        for anew in (False, True):
            path = self._download(repo, MANIFEST_NAME, tag, anew=anew)
            data = read_capped(path, canonical.MAX_JSON)
            if _fits_name(data, path.name):
                return data
        raise IntegrityError(f"{self.url} sent a damaged {MANIFEST_NAME} for {repo} {tag.name}", path=MANIFEST_NAME)

    def missing(self, manifest: Manifest) -> list[FileEntry]:
        """Files to send: none of a version that is there, else those that main is not known to hold."""
        if manifest.digest in self._places(manifest.name):
            return []
        present = self._main(manifest.name)[1]
        return [entry for entry in manifest.files if present.get(entry.path) != entry.sha256]

    def read(self, manifest: Manifest, entry: FileEntry, offset: int) -> Iterable[bytes]:
        """Bytes of a file, by way of the client's cache."""
        repo, tag = self._repo(manifest.name), self._place(manifest.name, manifest.digest)
        path = self._download(repo, entry.path, tag)
        if sha256_file(path) != (entry.sha256, entry.size):
            path = self._download(repo, entry.path, tag, anew=True)
        with open_regular(path) as file:
            file.seek(offset)
            while chunk := file.read(CHUNK):
                yield chunk

    def write(self, manifest: Manifest, entry: FileEntry, source: Path, advance: Advance) -> None:
        """Send a large file; a small one waits for the one commit that `publish` makes of all."""
        from huggingface_hub import CommitOperationAdd

        repo = self._repo(manifest.name)
        with self._translated(repo):
            if not self._staged.get(manifest.digest):
                self._api.create_repo(repo, exist_ok=True)
            self._api.preupload_lfs_files(repo, [CommitOperationAdd(entry.path, str(source))])
        self._staged.setdefault(manifest.digest, {})[entry.path] = source
        advance(entry.size)

    def publish(self, manifest: Manifest) -> bool:
        """Commit all files at once, on top of the head that was seen, and tag the commit with the version."""
        repo, catalogue = self._repo(manifest.name), self.catalogue(manifest.name)
        if refuse_conflict(manifest.ref, manifest.digest, catalogue, where=self.url):
            return False
        commit = self._commit(manifest)
        try:
            with self._translated(repo):
                self._api.create_tag(repo, tag=manifest.version, revision=commit)
        except Conflict:
            if manifest.digest in self._places(manifest.name):  # someone else published the same, just now
                return False
            raise
        if manifest.digest not in self._places(manifest.name):
            raise RemoteError(
                f"{self.url} does not give back the manifest of {manifest.ref} that was sent",
                ref=manifest.ref,
                digest=manifest.digest,
            )
        self._staged.pop(manifest.digest, None)
        return True

    def _commit(self, manifest: Manifest) -> str:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        repo, staged = self._repo(manifest.name), self._staged.get(manifest.digest, {})
        for tried in range(1, _TRIES + 1):
            head, present = self._main(manifest.name)
            absent = [e.path for e in manifest.files if e.path not in staged and present.get(e.path) != e.sha256]
            if absent:
                raise NotFound(f"{self.url} lacks {', '.join(absent[:5])} of {manifest.ref}", hint="push again")
            wanted = {entry.path for entry in manifest.files} | {MANIFEST_NAME}
            # New operations each time: the client asks what is there already, which must be what `head` holds.
            changes: list[Any] = [CommitOperationDelete(path) for path in present.keys() - wanted - _KEPT]
            changes += [CommitOperationAdd(path, str(source)) for path, source in staged.items()]
            changes.append(CommitOperationAdd(MANIFEST_NAME, manifest.canonical))
            try:
                with self._translated(repo):
                    done = self._api.create_commit(repo, changes, commit_message=str(manifest.ref), parent_commit=head)
                return str(done.oid)
            except Conflict:
                if tried == _TRIES:
                    raise
                time.sleep(tried * secrets.randbelow(100) / 1000)  # others push, too
        raise AssertionError

    def tag(self, name: str, alias: str, digest: str) -> None:
        """Let a tag stand on the commit of a version."""
        repo, place = self._repo(name), self._place(name, digest)
        with self._translated(repo):
            present = {ref.name: ref.target_commit for ref in self._api.list_repo_refs(repo).tags}
            if present.get(alias) == place.commit:
                return
            if alias in present:
                self._api.delete_tag(repo, tag=alias)
            self._api.create_tag(repo, tag=alias, revision=place.commit)

    def yank(self, name: str, digest: str, reason: str | None) -> None:
        """Refuse: the protocol knows no yank."""
        raise UsageError(
            f"{self.url} cannot be told to yank: the Hugging Face protocol has no word for it",
            hint="run `hub yank` on the machine of the registry, with HUB_HOME at its store",
        )

    def _main(self, name: str) -> tuple[str | None, dict[str, str | None]]:
        """Head of main (None without a repository), and its files: path -> sha256 where that is known.

        It is known of large files, and of all where the head is the commit of a version.
        """
        from huggingface_hub.errors import RepositoryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        from hub.manifest import Manifest

        repo = self._repo(name)
        try:
            with self._translated(repo):
                head = self._api.repo_info(repo).sha
                entries = list(self._api.list_repo_tree(repo, recursive=True, revision=head))
        except RemoteError as error:
            if isinstance(error.__cause__, RepositoryNotFoundError):
                return None, {}
            raise
        files = [entry for entry in entries if isinstance(entry, RepoFile)]
        found = {file.path: file.lfs.sha256 if file.lfs else None for file in files}
        for tag in self._tags.get(repo, {}).values():
            if tag.commit == head:
                listed = Manifest.parse(self._manifest_at(repo, tag)).files
                found |= {entry.path: entry.sha256 for entry in listed if entry.path in found}
        return head, found

    def _repo(self, name: str) -> str:
        ref = AdapterRef.parse(name)
        return f"{self.namespace or ref.namespace}/{ref.name}"

    def _places(self, name: str) -> dict[str, _Tag]:
        self.catalogue(name)
        return self._tags.get(self._repo(name), {})

    def _place(self, name: str, digest: str) -> _Tag:
        found = self._tags.get(self._repo(name), {}).get(digest) or self._places(name).get(digest)
        if found is None:
            raise NotFound(f"{self.url} has no version of {name} with the digest {digest[:19]}...", digest=digest)
        return found

    def _download(self, repo: str, path: str, tag: _Tag, *, anew: bool = False) -> Path:
        """Where the client's cache has a file; the file itself, as the cache keeps links."""
        from huggingface_hub import constants, try_to_load_from_cache

        cache = constants.HF_HUB_CACHE
        if not anew:
            found = try_to_load_from_cache(repo, path, cache_dir=cache, revision=tag.commit)
            if isinstance(found, str):
                return Path(found).resolve()
        # By the name of the tag, so that the cache knows it offline; a yanked version is no ref, but its commit is.
        revision = tag.commit if tag.yanked else tag.name
        with self._translated(repo):
            place = self._api.hf_hub_download(repo, path, revision=revision, cache_dir=cache, force_download=anew)
        return Path(place).resolve()

    @contextmanager
    def _translated(self, about: str) -> Iterator[None]:
        """Turn what the client raises into errors that say what to do."""
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

        try:
            yield
        except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
            raise self._offline(about, error) from error
        except HfHubHTTPError as error:
            raise self._refusal(about, error) from error
        except _transport_error() as error:
            raise self._offline(about, error) from error

    def _offline(self, about: str, error: Exception) -> _Offline:
        hint = "check the network and HF_ENDPOINT; what was pulled before works offline"
        return _Offline(f"{self.endpoint} cannot be reached for {about}: {_first_line(error)}", hint=hint)

    def _refusal(self, about: str, error: Any) -> HubError:
        status = getattr(error.response, "status_code", 0)
        said = error.server_message or _first_line(error)
        text = f"{self.endpoint} refuses {about} ({status}): {' '.join(said.split())[:300]}"
        if status in (409, 412):
            return Conflict(text, hint="look what is there now, then push again")
        if status in (401, 403):
            return RemoteError(text, hint="log in with `hf auth login`, or set HF_TOKEN to a token that may do this")
        return RemoteError(text)


class _Offline(RemoteError):
    """The endpoint cannot be reached, or must not be."""


def _parse(url: str) -> tuple[str, str | None]:
    """Endpoint and namespace of a URL. Raises UsageError."""
    parts = urlsplit(url)
    hint = "write hf://, hf://namespace, hf+https://host or hf+https://host/namespace"
    if parts.query or parts.fragment or parts.username:
        raise UsageError(f"{url} has more than a host and a namespace", hint=hint)
    scheme, path = parts.scheme.lower(), parts.path.strip("/")
    if scheme == "hf":
        endpoint, namespace, rest = os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT, parts.netloc, path
    else:
        endpoint, (namespace, _, rest) = f"{scheme.removeprefix('hf+')}://{parts.netloc}", path.partition("/")
    if rest or (scheme != "hf" and not parts.netloc):
        raise UsageError(f"{url} is not a registry and a namespace", hint=hint)
    return endpoint.rstrip("/"), check_name(namespace, what="namespace") if namespace else None


def _transport_error() -> type[Exception]:
    """Base of what the client's transport raises; which library that is depends on the client's version."""
    library: Any = import_module("httpx2" if find_spec("httpx2") else "httpx")
    error: type[Exception] = library.HTTPError
    return error


def _fits_name(data: bytes, name: str) -> bool:
    """Whether bytes are those of their entity tag, by which the cache names its blobs; True for any other name."""
    if len(name) == 64:
        return hashlib.sha256(data).hexdigest() == name
    if len(name) == 40:
        return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest() == name
    return True


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
