"""Repositories of the Hugging Face Hub, or of anything that speaks its protocol, as a remote: public API only.

One repository holds one adapter, and a tag is a version: ``module.json`` at that tag is the manifest. Other tags on
the commit of a version are aliases. What was pulled once is in the client's cache and can be pulled again offline.
The client checks no hashes; here every byte is checked against the manifest, and a cached file that does not fit
is fetched anew.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hub.clients.huggingface import DEFAULT_ENDPOINT, Client, Offline, Tag, cached_manifests, fits_name, parse
from hub.errors import Conflict, IntegrityError, NotFound, RemoteError, UsageError
from hub.io import canonical_json as canonical
from hub.io.files import CHUNK, open_regular, read_capped, sha256_file
from hub.manifest import MANIFEST_NAME
from hub.ref import (
    AdapterRef,
    check_digest,
    check_version,
    names_adapter,
    names_alias,
    spells_version,
)
from hub.remotes.base import REMOTES
from hub.storage.releases import Catalogue, Release, in_order, refuse_conflict
from hub.storage.signatures import MAX_KEYS, MAX_SIGNATURE, names_key
from hub.storage.staging import Advance

if TYPE_CHECKING:
    from hub.manifest import FileEntry, Manifest

_WORKERS = 8  # manifests read at a time
_TRIES = 12  # commits that may come between ours and the head we saw
_YANKED = "yanked/"  # name of a ref that our own registry keeps for a yanked version, among the converts
_SIGNATURES = "signatures"  # branch
_KEPT = frozenset({".gitattributes"})  # files that belong to the repository, not to the artifact


@REMOTES.register("hf", "hf+http", "hf+https")
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
        self.endpoint, self.namespace = parse(url)
        self._client = Client(self.endpoint)
        self._private = False
        self._creating = threading.Lock()  # of several files that are sent at once, the first one makes the repository
        self._tags: dict[str, dict[str, Tag]] = {}  # repository -> digest -> where it is
        self._signed: dict[str, str | None] = {}  # repository -> head of the branch of signatures
        self._staged: dict[str, dict[str, Path]] = {}  # digest -> path in the repository -> where its bytes are

    def keep_private(self) -> None:
        """Make repositories private from now on; one that is public already is refused when something is sent to it."""
        self._private = True

    def _make(self, repo: str) -> None:
        """Let there be a repository; called where the client's errors are translated."""
        self._client.api.create_repo(repo, exist_ok=True, private=self._private or None)
        if self._private and not self._client.api.repo_info(repo).private:
            raise Conflict(
                f"{repo} in {self.url} is public already, so nothing was sent to it",
                hint=f"hf repos settings {repo} --private hides it; or push without --private",
            )

    def names(self) -> list[str]:
        """All names of the namespace, or of a registry of one's own; none where that would be the whole Hub."""
        if self.namespace is None and self.endpoint == DEFAULT_ENDPOINT:
            return []
        with self._client.translated("the list of repositories"):
            ids = [model.id for model in self._client.api.list_models(author=self.namespace)]
        return sorted(name for name in ids if names_adapter(name))

    def catalogue(self, name: str) -> Catalogue:
        """Versions and aliases of a repository, from its tags; from the client's cache where it is offline."""
        from huggingface_hub.errors import RepositoryNotFoundError

        repo = self._repo(name)
        try:
            with self._client.translated(repo):
                refs = self._client.api.list_repo_refs(repo)
        except Offline as error:
            return self._cached(name, error)
        except RemoteError as error:
            if isinstance(error.__cause__, RepositoryNotFoundError):
                return Catalogue(name)
            raise
        heads = {ref.name: ref.target_commit for ref in refs.branches}
        self._signed[repo] = heads.get(_SIGNATURES)
        tags = [Tag(ref.name, ref.target_commit) for ref in refs.tags]
        hidden = [ref for ref in refs.converts if ref.name.startswith(_YANKED)]
        tags += [Tag(ref.name.removeprefix(_YANKED), ref.target_commit, True) for ref in hidden]
        versions = [tag for tag in tags if spells_version(tag.name)]
        with ThreadPoolExecutor(_WORKERS) as pool:
            digests = list(pool.map(lambda tag: self._digest(repo, tag), versions))
        return self._folded(name, tags, dict(zip(versions, digests, strict=True)))

    def _folded(self, name: str, tags: list[Tag], digests: dict[Tag, str | None]) -> Catalogue:
        places = {digest: tag for tag, digest in digests.items() if digest is not None}
        self._tags[self._repo(name)] = places
        reason = f"withdrawn in {self.url}"
        releases = [
            Release(check_version(tag.name), digest, reason if tag.hidden else None) for digest, tag in places.items()
        ]
        of_commit = {tag.commit: digest for digest, tag in places.items()}
        aliases = {tag.name: of_commit[tag.commit] for tag in tags if names_alias(tag.name) and tag.commit in of_commit}
        return Catalogue(name, in_order(releases), aliases)

    def _cached(self, name: str, reason: RemoteError) -> Catalogue:
        """Versions whose manifest is in the client's cache."""
        tags: list[Tag] = []
        digests: dict[Tag, str | None] = {}
        for here, data in cached_manifests(self._repo(name)):
            tags += here
            digests |= {tag: canonical.digest(data) for tag in here if spells_version(tag.name)}
        if not digests:
            raise reason
        return self._folded(name, tags, digests)

    def _digest(self, repo: str, tag: Tag) -> str | None:
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

    def _manifest_at(self, repo: str, tag: Tag) -> bytes:
        for anew in (False, True):
            path = self._client.download(repo, MANIFEST_NAME, tag, anew=anew)
            data = read_capped(path, canonical.MAX_JSON)
            if fits_name(data, path.name):
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
        path = self._client.download(repo, entry.path, tag)
        if sha256_file(path) != (entry.sha256, entry.size):
            path = self._client.download(repo, entry.path, tag, anew=True)
        with open_regular(path) as file:
            file.seek(offset)
            while chunk := file.read(CHUNK):
                yield chunk

    def write(self, manifest: Manifest, entry: FileEntry, source: Path, advance: Advance) -> None:
        """Send a large file; a small one waits for the one commit that `publish` makes of all."""
        from huggingface_hub import CommitOperationAdd

        repo = self._repo(manifest.name)
        with self._client.translated(repo):
            with self._creating:
                if manifest.digest not in self._staged:
                    self._make(repo)
                    self._staged[manifest.digest] = {}
            self._client.api.preupload_lfs_files(repo, [CommitOperationAdd(entry.path, str(source))])
        self._staged[manifest.digest][entry.path] = source
        advance(entry.size)

    def publish(self, manifest: Manifest) -> bool:
        """Commit all files at once, on top of the head that was seen, and tag the commit with the version."""
        repo, catalogue = self._repo(manifest.name), self.catalogue(manifest.name)
        if refuse_conflict(manifest.ref, manifest.digest, catalogue, where=self.url):
            return False
        if self._private:  # whatever had to be sent before
            with self._client.translated(repo):
                self._make(repo)
        commit = self._commit(manifest)
        try:
            with self._client.translated(repo):
                self._client.api.create_tag(repo, tag=manifest.version, revision=commit)
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
                with self._client.translated(repo):
                    done = self._client.api.create_commit(
                        repo, changes, commit_message=str(manifest.ref), parent_commit=head
                    )
                return str(done.oid)
            except Conflict:
                if tried == _TRIES:
                    raise
                time.sleep(tried * secrets.randbelow(100) / 1000)  # others push, too
        raise AssertionError

    def tag(self, name: str, alias: str, digest: str) -> None:
        """Let a tag stand on the commit of a version."""
        repo, place = self._repo(name), self._place(name, digest)
        with self._client.translated(repo):
            present = {ref.name: ref.target_commit for ref in self._client.api.list_repo_refs(repo).tags}
            if present.get(alias) == place.commit:
                return
            if alias in present:
                self._client.api.delete_tag(repo, tag=alias)
            self._client.api.create_tag(repo, tag=alias, revision=place.commit)

    def yank(self, name: str, digest: str, reason: str | None) -> None:
        """Refuse: the protocol knows no yank."""
        raise UsageError(
            f"{self.url} cannot be told to yank: the Hugging Face protocol has no word for it",
            hint="run `hub yank` on the machine of the registry, with HUB_HOME at its store",
        )

    def delete(self, name: str, digest: str, reason: str) -> None:
        """Refuse: a commit stays in a repository, and nothing there could say that the number is taken."""
        raise UsageError(
            f"{self.url} cannot delete a version for good: a repository keeps its commits",
            hint="run `hub delete` on the machine of the registry, with HUB_HOME at its store; on the Hugging Face Hub "
            f"only all versions can go: hf repos delete {self._repo(name)}",
        )

    def signatures(self, name: str, digest: str) -> dict[str, bytes]:
        """Files of a branch of their own, as the commit of a version does not change."""
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        repo, folder = self._repo(name), check_digest(digest).removeprefix("sha256:")
        head = self._signed.get(repo)
        if head is None:
            return {}
        place = Tag(_SIGNATURES, head, hidden=True)
        try:
            with self._client.translated(repo):
                entries = list(self._client.api.list_repo_tree(repo, folder, revision=place.commit))
        except RemoteError as error:
            if isinstance(error.__cause__, EntryNotFoundError):
                return {}
            raise
        files = [file.path for file in entries if isinstance(file, RepoFile) and file.size <= MAX_SIGNATURE]
        keys = {Path(path).stem: path for path in files if names_key(Path(path).stem)}
        return {
            key: read_capped(self._client.download(repo, path, place), MAX_SIGNATURE)
            for key, path in list(keys.items())[:MAX_KEYS]
        }

    def sign(self, name: str, digest: str, signatures: Mapping[str, bytes]) -> None:
        """Commit them to that branch."""
        from huggingface_hub import CommitOperationAdd

        repo, folder = self._repo(name), check_digest(digest).removeprefix("sha256:")
        files = [CommitOperationAdd(f"{folder}/{key}.json", data) for key, data in signatures.items()]
        with self._client.translated(repo):
            self._client.api.create_branch(repo, branch=_SIGNATURES, exist_ok=True)
            self._client.api.create_commit(repo, files, commit_message="Signatures", revision=_SIGNATURES)

    def _main(self, name: str) -> tuple[str | None, dict[str, str | None]]:
        """Head of main (None without a repository), and its files: path -> sha256 where that is known.

        It is known of large files, and of all where the head is the commit of a version.
        """
        from huggingface_hub.errors import RepositoryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        from hub.manifest import Manifest

        repo = self._repo(name)
        try:
            with self._client.translated(repo):
                head = self._client.api.repo_info(repo).sha
                entries = list(self._client.api.list_repo_tree(repo, recursive=True, revision=head))
        except RemoteError as error:
            if isinstance(error.__cause__, RepositoryNotFoundError):
                return None, {}
            raise
        files = [entry for entry in entries if isinstance(entry, RepoFile)]
        hashes = {file.path: file.lfs.sha256 if file.lfs else None for file in files}
        for tag in self._tags.get(repo, {}).values():
            if tag.commit == head:
                listed = Manifest.parse(self._manifest_at(repo, tag)).files
                hashes |= {entry.path: entry.sha256 for entry in listed if entry.path in hashes}
        return head, hashes

    def _repo(self, name: str) -> str:
        ref = AdapterRef.parse(name)
        return f"{self.namespace or ref.namespace}/{ref.name}"

    def _places(self, name: str) -> dict[str, Tag]:
        self.catalogue(name)
        return self._tags.get(self._repo(name), {})

    def _place(self, name: str, digest: str) -> Tag:
        place = self._tags.get(self._repo(name), {}).get(digest) or self._places(name).get(digest)
        if place is None:
            raise NotFound(f"{self.url} has no version of {name} with the digest {digest[:19]}...", digest=digest)
        return place
