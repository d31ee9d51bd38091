"""A manifest without its tensors: what lists, searches and indexes need, at a fraction of the cost."""

from __future__ import annotations

import json
from typing import Any


def outline(module: bytes) -> dict[str, Any]:
    """Read canonical manifest bytes as plain JSON, leaving ``tensors`` out.

    The keys of canonical JSON are sorted, so the list of tensors, nine tenths of a manifest, lies between
    ``"tensors":[`` and ``],"tensors_digest"``, and is cut out before parsing. Where the same keys stand elsewhere (in
    hyperparameters, say), the cut leaves no valid JSON and all of it is read, or it takes out what nobody indexes.
    """
    start, stop = module.find(b',"tensors":['), module.rfind(b'],"tensors_digest":')
    if 0 < start < stop:
        try:
            document: dict[str, Any] = json.loads(module[:start] + module[stop + 1 :])
        except ValueError:
            pass
        else:
            return document
    document = json.loads(module)
    document.pop("tensors", None)
    return document
