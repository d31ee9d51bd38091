"""Large files by git-lfs: the batch call hands out signed links, the upload streams to disk and is checked.

Clients send nothing but the link with the bytes, so the link carries who allowed it: an HMAC over repository,
sha256, size and time of expiry, keyed with a secret of this process.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

from hub.io.disk import disk_errors
from hub.registry.context import Access, Context
from hub.registry.errors import ApiError, too_large
from hub.registry.state.changes import known_size
from hub.registry.state.git_ids import File

LIFETIME = 6 * 3600  # seconds that a link is good for
MAX_OBJECTS = 1000


def batch(access: Access, base_url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Answer a batch call (git-lfs, docs/api/batch.md): a link for each object that is not here yet."""
    if body.get("operation") != "upload" or body.get("hash_algo", "sha256") != "sha256":
        raise ApiError(422, "large files are uploaded here, by sha256; download them from /resolve/")
    wanted = body.get("objects")
    if not isinstance(wanted, list) or len(wanted) > MAX_OBJECTS:
        raise ApiError(422, f"objects is a list of at most {MAX_OBJECTS}")
    return {"transfer": "basic", "objects": [_object(access, base_url, each) for each in wanted]}


def _object(access: Access, base_url: str, wanted: object) -> dict[str, Any]:
    entry = wanted if isinstance(wanted, dict) else {}
    oid, size = entry.get("oid"), entry.get("size")
    if not (isinstance(oid, str) and len(oid) == 64 and set(oid) <= set("0123456789abcdef")):
        raise ApiError(422, "an object has an oid of 64 hex digits")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ApiError(422, "an object has a size in bytes")
    limit = access.context.limits.file
    if size > limit:
        reason = f"a file has at most {limit} bytes"
        return {"oid": oid, "size": size, "error": {"code": 413, "message": reason}}
    if known_size(access.repos, access.name, oid) == size:
        return {"oid": oid, "size": size}
    expires = int(time.time()) + LIFETIME
    query = urlencode({"size": size, "expires": expires, "sig": _sign(access.context, access.name, oid, size, expires)})
    href = f"{base_url}lfs/{access.name}/{oid}?{query}"
    return {"oid": oid, "size": size, "actions": {"upload": {"href": href, "expires_in": LIFETIME}}}


def check_link(context: Context, name: str, oid: str, size: int, expires: int, signature: str) -> None:
    """Refuse a link that was not signed here (403), has expired (403) or is too large (413)."""
    good = hmac.compare_digest(_sign(context, name, oid, size, expires).encode(), signature.encode("utf-8", "replace"))
    if not good or expires < time.time():
        raise ApiError(403, "this upload link is not valid any more: start the upload again")
    if size > context.limits.file:
        raise too_large("a file", context.limits.file)


def receive(context: Context, name: str, file: File, blocks: Iterator[bytes]) -> None:
    """Take in the bytes of a large file: whole and as announced, or not at all."""
    drafts = context.repos.drafts
    with disk_errors(drafts.root), drafts.staging.room() as room:
        staged, hasher, size = room / "large.file", hashlib.sha256(), 0
        with staged.open("xb") as target:
            for block in blocks:
                size += len(block)
                if size > file.size:
                    raise ApiError(400, f"more bytes than the {file.size} that were announced")
                hasher.update(block)
                target.write(block)
        if size != file.size or hasher.hexdigest() != file.sha256:
            raise ApiError(400, f"{size} bytes arrived with sha256 {hasher.hexdigest()[:16]}..., not as announced")
        if drafts.blobs.has(file.digest, file.size):
            drafts.blobs.path(file.digest).touch()
        else:
            drafts.blobs.adopt(staged, file.digest)
    with drafts.change() as db:
        db.execute("INSERT OR REPLACE INTO uploads VALUES (?, ?, ?, ?)", (name, file.sha256, file.size, time.time()))


def _sign(context: Context, name: str, oid: str, size: int, expires: int) -> str:
    text = f"{name}\n{oid}\n{size}\n{expires}"
    return hmac.new(context.secret, text.encode(), hashlib.sha256).hexdigest()
