"""Sending a file of a revision."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from hub.registry.guard import FILE_POLICY
from hub.registry.state.repositories import Repos, Revision

# All that an artifact may hold; nothing here runs in a browser, and the sandbox policy sees to the rest.
_TYPES = {".json": "application/json", ".md": "text/plain", ".txt": "text/plain", ".png": "image/png"}


class BlobResponse(FileResponse):
    """A file in chunks of 1 MiB: fewer hops between threads than the usual 64 KiB."""

    chunk_size = 2**20


def send_file(request: Request, repos: Repos, revision: Revision, path: str) -> Response:
    """Answer GET and HEAD of a file: ranges, If-None-Match, its commit and its entity tag."""
    file = revision.file(path)
    where = repos.path(file)
    etag = f'"{repos.etag(path, file)}"'
    headers = {
        "ETag": etag,
        "X-Repo-Commit": revision.oid,
        "Cache-Control": "private, no-cache",
        "Content-Security-Policy": FILE_POLICY,
        "Content-Disposition": f'attachment; filename="{Path(path).name}";',
    }
    if etag in {tag.strip() for tag in request.headers.get("if-none-match", "").split(",")}:
        return Response(status_code=304, headers=headers)
    media = _TYPES.get(Path(path).suffix, "application/octet-stream")
    return BlobResponse(where, headers=headers, media_type=media, stat_result=where.stat())
