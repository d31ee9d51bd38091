"""OCI registries as a remote: Harbor, GHCR, Zot, ECR, or a plain docker-registry.

One repository holds one adapter, and a tag is a version: its image manifest has ``module.json`` as the config and
every file as a layer (`hub.oci`). Other tags on the same image are aliases; ``_yanked.<version>`` marks a yank.
Requests are our own, so that every byte is checked against its digest; who may do what, the ``oras`` client finds out:
it reads the logins of docker, podman and their helpers.

A registry has no compare-and-swap. What is there is looked at before and after a tag is written, which shows a
race, but cannot prevent one; a registry whose tags are set to be immutable does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hub import canonical, oci
from hub.errors import Conflict, IntegrityError, NotFound, RefError, UsageError
from hub.files import open_regular
from hub.ref import (
    check_digest,
    names_adapter,
    names_alias,
    names_version,
    version_key,
)
from hub.remotes.base import register
from hub.resolve import Catalogue, Release, refuse_conflict
from hub.staging import Advance

if TYPE_CHECKING:
    from hub.manifest import FileEntry, Manifest
    from hub.oci_http import Wire

_WORKERS = 8  # tags looked up at a time
_YANK = "_yanked."  # before a version: no alias and no version starts with an underscore
_YANK_TYPE = "application/vnd.moduloom.yank.v1+json"
_EMPTY = b"{}"
_EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
_REASON = "dev.moduloom.yanked"
_DIGEST = "dev.moduloom.digest"
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*\Z")


@register("oci")
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
        self._modules: dict[str, tuple[str, Mapping[str, str]] | None] = {}  # image digest -> module, annotations

    @cached_property
    def _wire(self) -> Wire:
        from hub.oci_http import Wire

        return Wire(self.host, self.url)

    def names(self) -> list[str]:
        """All names below the prefix; none where the registry does not list its repositories."""
        found = self._wire.pages("/v2/_catalog?n=1000", "repositories", optional=True)
        below = f"{self.prefix}/" if self.prefix else ""
        names = (name.removeprefix(below) for name in found if name.startswith(below))
        return sorted(name for name in names if names_adapter(name))

    def catalogue(self, name: str) -> Catalogue:
        """Versions, aliases and yanks of a repository, from its tags."""
        repo = self._repo(name)
        tags = self._wire.pages(f"/v2/{repo}/tags/list?n=1000", "tags")
        known = [tag for tag in tags if names_version(tag) or names_alias(tag) or tag.startswith(_YANK)]
        with ThreadPoolExecutor(_WORKERS) as pool:
            images = dict(zip(known, pool.map(lambda tag: self._image(repo, tag), known), strict=True))
        releases, aliases = [], {}
        for tag, image in images.items():
            if image is None:
                continue
            digest, _ = image
            if names_version(tag):
                mark = images.get(_YANK + tag)
                yanked = mark[1].get(_REASON) if mark is not None and mark[0] == digest else None
                releases.append(Release(tag, digest, yanked))
            elif names_alias(tag):
                aliases[tag] = digest
        here = {release.digest for release in releases}
        aliases = {alias: digest for alias, digest in aliases.items() if digest in here}
        return Catalogue(name, tuple(sorted(releases, key=lambda release: version_key(release.version))), aliases)

    def manifest(self, name: str, digest: str) -> bytes:
        """Read the config blob of the image."""
        return self._wire.get(f"/v2/{self._repo(name)}/blobs/{check_digest(digest)}", f"the manifest of {name}")

    def missing(self, manifest: Manifest) -> list[FileEntry]:
        """Files whose blob is not in the repository, or has another size."""
        repo = self._repo(manifest.name)
        return [entry for entry in manifest.files if self._wire.size(f"/v2/{repo}/blobs/{entry.digest}") != entry.size]

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
        repo = self._repo(name)
        empty = {"mediaType": _EMPTY_TYPE, "digest": canonical.digest(_EMPTY), "size": len(_EMPTY)}
        mark = {
            "schemaVersion": 2,
            "mediaType": oci.IMAGE_MANIFEST,
            "artifactType": _YANK_TYPE,
            "config": empty,
            "layers": [empty],
            "annotations": {_DIGEST: digest, **({} if reason is None else {_REASON: reason})},
        }
        self._wire.upload_bytes(repo, _EMPTY)
        self._put(repo, _YANK + release.version, canonical.dumps(mark))

    def _put(self, repo: str, tag: str, image: bytes) -> None:
        self._wire.put(f"/v2/{repo}/manifests/{tag}", image, oci.IMAGE_MANIFEST, f"the tag {tag}")
        if self._wire.digest(f"/v2/{repo}/manifests/{tag}", oci.IMAGE_MANIFEST) != canonical.digest(image):
            raise Conflict(
                f"someone else has moved {repo}:{tag} in {self.url} just now",
                hint="look what is there, then try again; immutable tags prevent this",
            )

    def _image(self, repo: str, tag: str) -> tuple[str, Mapping[str, str]] | None:
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
        repo = f"{self.prefix}/{name}" if self.prefix else name
        if not _REPOSITORY.match(repo):
            raise RefError(
                f"{name} cannot be the name of an OCI repository",
                ref=name,
                hint="between letters and digits put one '.', one or two '_', or dashes",
            )
        return repo


def _read(image: bytes) -> tuple[str, Mapping[str, str]] | None:
    """Module digest and annotations of an image manifest that is ours: an artifact's, or a mark."""
    try:
        document: dict[str, Any] = json.loads(image)
        config, notes = document["config"], document.get("annotations") or {}
        if config["mediaType"] == oci.MODULE:
            return check_digest(config["digest"]), notes
        if document.get("artifactType") == _YANK_TYPE:
            return check_digest(notes[_DIGEST]), notes
    except (ValueError, KeyError, TypeError, AttributeError, RefError):  # an image of somebody else
        pass
    return None
