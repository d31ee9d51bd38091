"""The OCI face of a store: an image manifest for each artifact, and ``index.json``.

Media types are those of the CNCF model-spec, so that tools which speak OCI know weights from cards.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from hub.contents.manifest_outline import outline
from hub.io import canonical_json as canonical
from hub.ref import name_key

LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
IMAGE_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
IMAGE_INDEX = "application/vnd.oci.image.index.v1+json"
ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
SEQ = "dev.moduloom.log.seq"
MODULE = "application/vnd.moduloom.module.v1+json"
_LAYERS = {"weights": "weight", "extra": "weight", "config": "weight.config", "card": "doc"}


def image_manifest(module: bytes) -> bytes:
    """OCI image manifest of an artifact: ``module.json`` is the config, every file a layer.

    Parameters
    ----------
    module
        Canonical bytes of a checked manifest.

    Returns
    -------
    bytes
        A function of `module` alone. Its keys and texts are plain, so this is RFC 8785 as well.
    """
    return image_of(outline(module), canonical.digest(module), len(module))


def image_of(document: Mapping[str, Any], digest: str, size: int) -> bytes:
    """`image_manifest` of a manifest already read (`hub.contents.manifest_outline`), with its digest and size."""
    config = {"mediaType": MODULE, "digest": digest, "size": size}
    layers = [_layer(entry) for entry in document.get("files", ())]
    created = {"org.opencontainers.image.created": document["created"]} if "created" in document else {}
    image = {
        "schemaVersion": 2,
        "mediaType": IMAGE_MANIFEST,
        "artifactType": ARTIFACT_TYPE,
        "config": config,
        "layers": layers or [config],  # an image has at least one layer
        "annotations": {
            "org.opencontainers.image.title": document["name"],
            "org.opencontainers.image.version": document["version"],
            **created,
        },
    }
    return _dumps(image)


def _layer(entry: Mapping[str, Any]) -> dict[str, Any]:
    path = entry["path"]
    what = _LAYERS.get(entry.get("role", ""), "weight" if path.endswith(".safetensors") else "doc")
    return {
        "mediaType": f"application/vnd.cncf.model.{what}.v1.raw",
        "digest": f"sha256:{entry['sha256']}",
        "size": entry["size"],
        "annotations": {"org.opencontainers.image.title": path, "org.cncf.model.filepath": path},
    }


def _dumps(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def descriptor(name: str, tag: str, digest: str, size: int) -> dict[str, Any]:
    """Entry of ``index.json`` for an image manifest, by digest and size, under the name ``ns/name:tag``."""
    return {
        "mediaType": IMAGE_MANIFEST,
        "artifactType": ARTIFACT_TYPE,
        "digest": digest,
        "size": size,
        "annotations": {"org.opencontainers.image.ref.name": f"{name}:{tag}"},
    }


def write_index(entries: Iterable[dict[str, Any]], *, seq: int) -> bytes:
    """``index.json`` of descriptors; `seq` is the number of the log entry it reflects."""
    document = {
        "schemaVersion": 2,
        "mediaType": IMAGE_INDEX,
        "manifests": sorted(entries, key=_tag),
        "annotations": {SEQ: str(seq)},
    }
    return _dumps(document)


def read_index(data: bytes, *, seq: int) -> list[dict[str, Any]] | None:
    """Descriptors of an ``index.json`` that reflects log entry `seq`; None for any other one."""
    try:
        document = json.loads(data)
        if document["annotations"][SEQ] != str(seq):
            return None
        entries: list[dict[str, Any]] = document["manifests"]
        return entries if all(_tag(entry) for entry in entries) else None
    except (ValueError, KeyError, TypeError):  # not ours, or damaged: the caller makes it anew
        return None


def of_name(entry: dict[str, Any], name: str) -> bool:
    """Whether a descriptor belongs to ``ns/name``, however that is written."""
    return name_key(_tag(entry).rpartition(":")[0]) == name_key(name)


def _tag(entry: dict[str, Any]) -> str:
    return str(entry["annotations"]["org.opencontainers.image.ref.name"])
