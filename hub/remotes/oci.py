"""OCI registries as a remote: Harbor, GHCR, Zot, ECR, or a plain docker-registry.

One repository holds one adapter, and a tag is a version: its image manifest has ``module.json`` as the config and
every file as a layer (`hub.storage.oci`). Other tags on the same image are aliases. Beside a version may be marks:
small images with tags of their own, ``_yanked.<version>``, ``_deleted.<version>``, ``_signed.<hex>`` with signatures.
Requests are our own, so that every byte is checked against its digest; who may do what, the ``oras`` client finds out:
it reads the logins of docker, podman and their helpers.

A registry has no compare-and-swap. What is there is looked at before and after a tag is written: who finds another
image there says so, by Conflict. Of two who write in the same moment, the first one may see its own image and be
overwritten then; only a registry whose tags are set to be immutable prevents that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hub.errors import Conflict, IntegrityError, NotFound, RefError, UsageError
from hub.io import canonical_json as canonical
from hub.io.files import open_regular
from hub.ref import (
    check_digest,
    name_key,
    names_adapter,
    names_alias,
    names_version,
    version_key,
)
from hub.remotes.base import REMOTES, no_privacy
from hub.storage import oci
from hub.storage.releases import Catalogue, Release, Tombstone, in_order, refuse_aliased, refuse_conflict
from hub.storage.signatures import MAX_KEYS, names_key
from hub.storage.staging import Advance

if TYPE_CHECKING:
    from hub.clients.oci import Wire
    from hub.manifest import FileEntry, Manifest

_WORKERS = 8  # tags or blobs looked up at a time
_YANK, _DELETE, _SIGN = "_yanked.", "_deleted.", "_signed."  # before a version; nothing else starts with an underscore
_MARK_TYPES = {
    _YANK: "application/vnd.moduloom.yank.v1+json",
    _DELETE: "application/vnd.moduloom.delete.v1+json",
    _SIGN: "application/vnd.moduloom.signatures.v1+json",
}
_SIGNATURE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_EMPTY = b"{}"
_EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
_REASON, _KEY = "dev.moduloom.yanked", "dev.moduloom.key"
_DIGEST = "dev.moduloom.digest"
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*\Z")


_Image = tuple[str, Mapping[str, str]]  # digest of the module that an image is of, and its annotations


@REMOTES.register("oci")
class OciRemote:
    """A registry, or a part of one.

    Parameters
    ----------
    url
        ``oci://host[:port]`` or ``oci://host/prefix``; then ``acme/tone`` lives in ``host/prefix/acme/tone``. On
        loopback it is plain HTTP, else HTTPS.
    """

    checks_uploads = False  # it does, but would say so in words of its own

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        self.host, self.prefix = parts.netloc, parts.path.strip("/")
        if not self.host or parts.query or parts.fragment or (self.prefix and not _REPOSITORY.match(self.prefix)):
            raise UsageError(f"{url} is not a registry and a prefix", hint="write oci://host, or oci://host/prefix")
        self._modules: dict[str, _Image | None] = {}  # image digest -> module, annotations

    @cached_property
    def _wire(self) -> Wire:
        from hub.clients.oci import Wire

        return Wire(self.host, self.url)

    def keep_private(self) -> None:
        """Refuse."""
        raise no_privacy(self.url, "the registry's own settings say who may read a repository")

    def names(self) -> list[str]:
        """All names below the prefix; none where the registry does not list its repositories."""
        repositories = self._wire.pages("/v2/_catalog?n=1000", "repositories", optional=True)
        below = f"{self.prefix}/" if self.prefix else ""
        names = (name.removeprefix(below) for name in repositories if name.startswith(below))
        return sorted(name for name in names if names_adapter(name))

    def catalogue(self, name: str) -> Catalogue:
        """Versions, aliases and yanks of a repository, from its tags."""
        repo = self._repo(name)
        tags = self._wire.pages(f"/v2/{repo}/tags/list?n=1000", "tags")
        marks = (_YANK, _DELETE)
        known = [tag for tag in tags if names_version(tag) or names_alias(tag) or tag.startswith(marks)]
        with ThreadPoolExecutor(_WORKERS) as pool:
            images = dict(zip(known, pool.map(lambda tag: self._image(repo, tag), known), strict=True))
        gone = [
            Tombstone(tag.removeprefix(_DELETE), digest, notes.get(_REASON))
            for tag, (digest, notes) in _present(images)
            if tag.startswith(_DELETE) and names_version(tag.removeprefix(_DELETE))
        ]
        dead = {version_key(stone.version) for stone in gone}
        releases, aliases = [], {}
        for tag, (digest, _) in _present(images):
            if names_version(tag) and version_key(tag) not in dead:
                mark = images.get(_YANK + tag)
                yanked = mark[1].get(_REASON) if mark is not None and mark[0] == digest else None
                releases.append(Release(tag, digest, yanked))
            elif names_alias(tag):
                aliases[tag] = digest
        here = {release.digest for release in releases}
        aliases = {alias: digest for alias, digest in aliases.items() if digest in here}
        return Catalogue(name, in_order(releases), aliases, in_order(gone))

    def manifest(self, name: str, digest: str) -> bytes:
        """Read the config blob of the image."""
        return self._wire.get(f"/v2/{self._repo(name)}/blobs/{check_digest(digest)}", f"the manifest of {name}")

    def missing(self, manifest: Manifest) -> list[FileEntry]:
        """Files whose blob is not in the repository, or has another size."""
        repo = self._repo(manifest.name)
        with ThreadPoolExecutor(_WORKERS) as pool:
            sizes = pool.map(lambda entry: self._wire.size(f"/v2/{repo}/blobs/{entry.digest}"), manifest.files)
            return [entry for entry, size in zip(manifest.files, sizes, strict=True) if size != entry.size]

    def read(self, manifest: Manifest, entry: FileEntry, offset: int) -> Iterable[bytes]:
        """Bytes of a layer from the offset on."""
        path = f"/v2/{self._repo(manifest.name)}/blobs/{entry.digest}"
        return self._wire.stream(path, offset, f"{entry.path} of {manifest.ref}")

    def write(self, manifest: Manifest, entry: FileEntry, source: Path, advance: Advance) -> None:
        """Upload a blob; the registry takes it when the digest is right."""
        with open_regular(source) as file:
            self._wire.upload(self._repo(manifest.name), entry.digest, file, entry.size, advance)

    def publish(self, manifest: Manifest) -> bool:
        """Write config, image manifest and the version's tag, then look whether it still stands there."""
        if refuse_conflict(manifest.ref, manifest.digest, self.catalogue(manifest.name), where=self.url):
            return False
        if lacks := [entry.path for entry in self.missing(manifest)]:
            raise IntegrityError(f"{self.url} lacks {', '.join(lacks[:5])} of {manifest.ref}", ref=manifest.ref)
        repo = self._repo(manifest.name)
        self._wire.upload_bytes(repo, manifest.canonical)
        self._put(repo, manifest.version, oci.image_manifest(manifest.canonical))
        if not refuse_conflict(manifest.ref, manifest.digest, self.catalogue(manifest.name), where=self.url):
            raise NotFound(f"{self.url} does not give back {manifest.ref}, which was sent", ref=manifest.ref)
        return True

    def tag(self, name: str, alias: str, digest: str) -> None:
        """Let one more tag stand for the image of a version."""
        release = self.catalogue(name).release(digest, where=self.url)
        repo = self._repo(name)
        self._put(repo, alias, self._bytes(repo, release.version))

    def yank(self, name: str, digest: str, reason: str | None) -> None:
        """Mark a release as yanked, or as not yanked any more: many registries delete no tag."""
        release = self.catalogue(name).release(digest, where=self.url)
        self._mark(name, _YANK, release.version, digest, {} if reason is None else {_REASON: reason})

    def delete(self, name: str, digest: str, reason: str) -> None:
        """Mark the version as deleted; then let the registry drop the image, where it does such a thing."""
        catalogue, repo = self.catalogue(name), self._repo(name)
        release = catalogue.release(digest, where=self.url)
        refuse_aliased(catalogue, release, where=self.url)
        image = self._wire.digest(f"/v2/{repo}/manifests/{release.version}", oci.IMAGE_MANIFEST)
        self._mark(name, _DELETE, release.version, digest, {_REASON: reason})
        if image is not None:
            self._wire.drop(f"/v2/{repo}/manifests/{image}")

    def signatures(self, name: str, digest: str) -> dict[str, bytes]:
        """Layers of the mark that holds the signatures of a digest."""
        repo, tag = self._repo(name), _SIGN + check_digest(digest).removeprefix("sha256:")
        if self._wire.digest(f"/v2/{repo}/manifests/{tag}", oci.IMAGE_MANIFEST) is None:
            return {}
        about = f"the signatures of {name}"
        blobs = _keys(self._bytes(repo, tag))
        return {key: self._wire.get(f"/v2/{repo}/blobs/{blob}", about) for key, blob in blobs.items()}

    def sign(self, name: str, digest: str, signatures: Mapping[str, bytes]) -> None:
        """Write the mark anew."""
        self._mark(name, _SIGN, digest.removeprefix("sha256:"), digest, {}, signatures)

    def _mark(
        self,
        name: str,
        what: str,
        which: str,
        digest: str,
        notes: Mapping[str, str],
        layers: Mapping[str, bytes] | None = None,
    ) -> None:
        """Say something about a version in a tag of its own: many registries delete no tag, and change no image."""
        repo = self._repo(name)
        empty = {"mediaType": _EMPTY_TYPE, "digest": canonical.digest(_EMPTY), "size": len(_EMPTY)}
        mark = {
            "schemaVersion": 2,
            "mediaType": oci.IMAGE_MANIFEST,
            "artifactType": _MARK_TYPES[what],
            "config": empty,
            "layers": [
                {"mediaType": _SIGNATURE_TYPE, "digest": canonical.digest(data), "size": len(data)}
                | {"annotations": {_KEY: key}}
                for key, data in sorted((layers or {}).items())
            ]
            or [empty],
            "annotations": {_DIGEST: digest, **notes},
        }
        for data in (_EMPTY, *(layers or {}).values()):
            self._wire.upload_bytes(repo, data)
        self._put(repo, what + which, canonical.dumps(mark))

    def _put(self, repo: str, tag: str, image: bytes) -> None:
        self._wire.put(f"/v2/{repo}/manifests/{tag}", image, oci.IMAGE_MANIFEST, f"the tag {tag}")
        if self._wire.digest(f"/v2/{repo}/manifests/{tag}", oci.IMAGE_MANIFEST) != canonical.digest(image):
            name = repo.removeprefix(f"{self.prefix}/") if self.prefix else repo
            raise Conflict(
                f"someone else has written {repo}:{tag} in {self.url} just now, over what you sent",
                ref=f"{name}@{tag}",
                hint=f"`hub pull {name}@{tag} --from {self.url}` shows what is there now; then send yours again, a "
                "version under a new number; a registry with immutable tags prevents this",
            )

    def _image(self, repo: str, tag: str) -> _Image | None:
        """What an image says: digest of the module it is of, and annotations. None where it is none of ours."""
        digest = self._wire.digest(f"/v2/{repo}/manifests/{tag}", oci.IMAGE_MANIFEST)
        if digest is None:
            return None
        if digest not in self._modules:
            self._modules[digest] = _read(self._bytes(repo, digest))
        return self._modules[digest]

    def _bytes(self, repo: str, tag: str) -> bytes:
        """Bytes of an image manifest, checked against its digest."""
        path = f"/v2/{repo}/manifests/"
        digest = tag if tag.startswith("sha256:") else self._wire.digest(path + tag, oci.IMAGE_MANIFEST)
        data = self._wire.get(f"{path}{digest}", f"{repo}:{tag}", accept=oci.IMAGE_MANIFEST)
        if canonical.digest(data) != digest:
            raise IntegrityError(
                f"{self.url} sent an image manifest of {repo} with the digest {canonical.digest(data)[:19]}..., "
                f"not {str(digest)[:19]}...",
                digest=digest,
                hint="the registry is damaged: publish the version there again under a new prefix",
            )
        return data

    def _repo(self, name: str) -> str:
        plain = name_key(name)  # a registry's repositories have no capitals
        repo = f"{self.prefix}/{plain}" if self.prefix else plain
        if not _REPOSITORY.match(repo):
            raise RefError(
                f"{name} cannot be the name of an OCI repository",
                ref=name,
                hint="between letters and digits put one '.', one or two '_', or dashes",
            )
        return repo


def _present(images: Mapping[str, _Image | None]) -> Iterator[tuple[str, _Image]]:
    """Tags of images of ours."""
    return ((tag, image) for tag, image in images.items() if image is not None)


def _keys(image: bytes) -> dict[str, str]:
    """Name of the key -> digest of the signature, as a mark lists them; none where it is not as we write it."""
    try:
        layers = [(layer.get("annotations") or {}, layer["digest"]) for layer in json.loads(image)["layers"]]
        keys = {str(notes[_KEY]): check_digest(digest) for notes, digest in layers if _KEY in notes}
    except (ValueError, KeyError, TypeError, AttributeError, RefError):
        return {}
    return {key: digest for key, digest in list(keys.items())[:MAX_KEYS] if names_key(key)}


def _read(image: bytes) -> _Image | None:
    """Module digest and annotations of an image manifest that is ours: an artifact's, or a mark."""
    try:
        document: dict[str, Any] = json.loads(image)
        config, notes = document["config"], document.get("annotations") or {}
        if config["mediaType"] == oci.MODULE:
            return check_digest(config["digest"]), notes
        if document.get("artifactType") in _MARK_TYPES.values():
            return check_digest(notes[_DIGEST]), notes
    except (ValueError, KeyError, TypeError, AttributeError, RefError):  # an image of somebody else
        pass
    return None
