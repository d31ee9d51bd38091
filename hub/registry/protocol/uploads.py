"""Uploads: which way each file goes, the commit itself, and large files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse

from hub.io.disk import disk_errors
from hub.registry.context import Access, context_of, writing
from hub.registry.errors import ApiError, too_large
from hub.registry.guard import unslash
from hub.registry.protocol import lfs
from hub.registry.protocol.account import JsonBody
from hub.registry.protocol.bodies import in_thread
from hub.registry.state import changes
from hub.registry.state.commit_stream import ignored, read_commit
from hub.registry.state.git_ids import File

router = APIRouter()
_NO_PULL_REQUESTS = "this registry has no pull requests: commit to a branch"


@router.post("/api/models/{ns}/{name}/preupload/{revision}")
def preupload(request: Request, ns: str, name: str, revision: str, body: JsonBody) -> JSONResponse:
    """Say how each file is to be sent, and what is there already; refuse what could never be committed."""
    access = writing(request, ns, name)
    if request.query_params.get("create_pr"):
        raise ApiError(403, _NO_PULL_REQUESTS)
    head = access.repos.head(access.name, unslash(revision))
    limits = access.context.limits
    wanted = body.get("files")
    if not isinstance(wanted, list) or len(wanted) > limits.operations:
        raise ApiError(400, "files is a list of what to upload")
    ways = [_way(access, head.tree, each) for each in wanted]
    headers = {}
    if any(way["uploadMode"] == "lfs" for way in ways):  # Xet itself swallows what the server says; this is shown
        headers["X-HF-Warning"] = f"large files; files of over {limits.inline} bytes need HF_HUB_DISABLE_XET=1 here"
    return JSONResponse({"files": ways, "commitOid": head.oid}, headers=headers)


def _way(access: Access, tree: Any, wanted: object) -> dict[str, Any]:
    entry = wanted if isinstance(wanted, dict) else {}
    path, size = entry.get("path"), entry.get("size")
    if not isinstance(path, str) or not isinstance(size, int) or size < 0:
        raise ApiError(400, "each file has a path and a size")
    if ignored(path):
        return {"path": path, "uploadMode": "regular", "shouldIgnore": True}
    changes.check_path(path)
    limits = access.context.limits
    if size > limits.file:
        raise too_large(f"{path[:100]} has {size} bytes and", limits.file)
    # A client with Xet switched on cannot do git-lfs elsewhere than at Hugging Face, so only files that are too
    # large for a commit's body go that way.
    mode = "regular" if size <= limits.inline else "lfs"
    way = {"path": path, "uploadMode": mode, "shouldIgnore": False}
    present = tree.get(path)
    if present is not None and present.size == size:  # the client compares this with its own file's, and skips it
        way["oid"] = access.repos.blob_oid(present) if mode == "regular" else present.sha256
    return way


@router.post("/api/models/{ns}/{name}/commit/{revision}")
async def commit(request: Request, ns: str, name: str, revision: str) -> JSONResponse:
    """Take in a commit; its body is read while it arrives."""
    access = await run_in_threadpool(writing, request, ns, name)
    if request.query_params.get("create_pr"):
        raise ApiError(403, _NO_PULL_REQUESTS)
    branch = unslash(revision)

    def work(blocks: Iterator[bytes]) -> changes.Committed:
        repos = access.repos
        repos.head(access.name, branch)  # before gigabytes travel
        with disk_errors(repos.drafts.root), repos.drafts.staging.room() as room:
            wanted = read_commit(blocks, room, access.context.limits)
            done = changes.commit(repos, access.name, branch, wanted, access.caller)
        repos.drafts.tidy()
        return done

    done = await in_thread(request, access.context.limits, access.context.uploads, work)
    oid = done.revision.oid
    url = f"{request.base_url}{access.name}/commit/{oid}"
    return JSONResponse({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})


@router.get("/api/models/{ns}/{name}/xet-write-token/{_revision}")
def xet_token(request: Request, ns: str, name: str, _revision: str) -> JSONResponse:
    """Refuse, telling what helps."""
    access = writing(request, ns, name)
    limit = access.context.limits.inline
    raise ApiError(400, f"no Xet storage here: set HF_HUB_DISABLE_XET=1 to upload files of over {limit} bytes")


@router.post("/{ns}/{name}.git/info/lfs/objects/batch")
def lfs_batch(request: Request, ns: str, name: str, body: JsonBody) -> JSONResponse:
    """Hand out upload links."""
    access = writing(request, ns, name)
    answer = lfs.batch(access, str(request.base_url), body)
    return JSONResponse(answer, media_type="application/vnd.git-lfs+json")


@router.put("/lfs/{ns}/{name}/{oid}")
async def lfs_upload(
    request: Request,
    ns: str,
    name: str,
    oid: Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")],
    size: Annotated[int, Query(ge=0)],
    expires: int,
    sig: Annotated[str, Query(max_length=64)],
) -> JSONResponse:
    """Take in a large file through a link of `lfs_batch`."""
    context = context_of(request)
    full = f"{ns}/{name}"
    lfs.check_link(context, full, oid, size, expires, sig)
    file = File(oid, size)
    await in_thread(request, context.limits, context.uploads, lambda blocks: lfs.receive(context, full, file, blocks))
    return JSONResponse({})
