"""The OCI face of a store: an image manifest for each artifact, and ``index.json``.

Media types are those of the CNCF model-spec, so that tools which speak OCI know weights from cards.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from hub import canonical

if TYPE_CHECKING:
    from hub.manifest import Manifest

LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
IMAGE_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
IMAGE_INDEX = "application/vnd.oci.image.index.v1+json"
ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
SEQ = "dev.moduloom.log.seq"
MODULE = "application/vnd.moduloom.module.v1+json"
_RAW = "application/vnd.cncf.model.{}.v1.raw"
_LAYERS = {"weights": "weight", "extra": "weight", "config": "weight.config", "card": "doc"}


def image_manifest(manifest: Manifest) -> bytes:
    """Canonical bytes of the OCI image manifest: ``module.json`` is the config, every file a layer."""
    layers = [
        {
            "mediaType": _RAW.format(_LAYERS.get(entry.role, "weight" if entry.path.endswith("tensors") else "doc")),
            "digest": entry.digest,
            "size": entry.size,
            "annotations": {
                "org.opencontainers.image.title": entry.path,
                "org.cncf.model.filepath": entry.path,
            },
        }
        for entry in manifest.files
    ]
    return canonical.dumps(
        {
            "schemaVersion": 2,
            "mediaType": IMAGE_MANIFEST,
            "artifactType": ARTIFACT_TYPE,
            "config": {"mediaType": MODULE, "digest": manifest.digest, "size": len(manifest.canonical)},
            "layers": layers,
            "annotations": {
                "org.opencontainers.image.title": manifest.name,
                "org.opencontainers.image.version": manifest.version,
                "org.opencontainers.image.created": manifest.as_dict()["created"],
            },
        }
    )


def descriptor(name: str, tag: str, image: bytes) -> dict[str, Any]:
    """Entry of ``index.json`` for an image manifest under the name ``ns/name:tag``."""
    return {
        "mediaType": IMAGE_MANIFEST,
        "artifactType": ARTIFACT_TYPE,
        "digest": canonical.digest(image),
        "size": len(image),
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
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


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
    """Whether a descriptor belongs to ``ns/name``."""
    return _tag(entry).rpartition(":")[0] == name


def _tag(entry: dict[str, Any]) -> str:
    return str(entry["annotations"]["org.opencontainers.image.ref.name"])
