"""Files of a revision: trees, paths, logs, downloads."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

from fastapi import APIRouter, Depends, Query
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hub.registry.context import context_of, downloading, reading
from hub.registry.errors import entry_not_found, repo_not_found
from hub.registry.guard import unslash
from hub.registry.protocol import infos
from hub.registry.protocol.bodies import read_form
from hub.registry.protocol.sending import send_file

router = APIRouter()
MAX_LOG = 1000  # commits


@router.get("/api/models/{ns}/{name}/tree/{revision}")
def tree(
    request: Request,
    ns: str,
    name: str,
    revision: str,
    recursive: Annotated[bool, Query()] = False,
    expand: Annotated[bool, Query()] = False,
) -> JSONResponse:
    """List the files and folders at the root of a revision."""
    return _tree(request, ns, name, revision, "", recursive, expand)


@router.get("/api/models/{ns}/{name}/tree/{revision}/{path:path}")
def subtree(
    request: Request,
    ns: str,
    name: str,
    revision: str,
    path: str,
    recursive: Annotated[bool, Query()] = False,
    expand: Annotated[bool, Query()] = False,
) -> JSONResponse:
    """List the files and folders of one folder."""
    return _tree(request, ns, name, revision, unslash(path).strip("/"), recursive, expand)


def _tree(
    request: Request, ns: str, name: str, revision: str, folder: str, recursive: bool, expand: bool
) -> JSONResponse:
    access = reading(request, ns, name)
    at = access.repos.resolve(access.name, unslash(revision))
    entries = infos.entries(access.repos, at, expand=expand)
    if folder and entries.get(folder, {}).get("type") != "directory":
        raise entry_not_found(access.name, folder, at.oid)
    prefix = f"{folder}/" if folder else ""
    inside = [entry for path, entry in entries.items() if path.startswith(prefix)]
    if not recursive:
        inside = [entry for entry in inside if "/" not in entry["path"][len(prefix) :]]
    return JSONResponse(inside)


async def paths_form(request: Request) -> dict[str, list[str]]:
    """Form of a paths-info request, read when the caller may see the repository."""
    await run_in_threadpool(reading, request, request.path_params["ns"], request.path_params["name"])
    return await read_form(request, context_of(request).limits)


@router.post("/api/models/{ns}/{name}/paths-info/{revision}")
def paths_info(
    request: Request, ns: str, name: str, revision: str, form: Annotated[dict[str, list[str]], Depends(paths_form)]
) -> JSONResponse:
    """Describe the asked-for paths that exist."""
    access = reading(request, ns, name)
    expand = form.get("expand", ["false"])[-1].lower() in ("true", "1")
    entries = infos.entries(access.repos, access.repos.resolve(access.name, unslash(revision)), expand=expand)
    wanted = dict.fromkeys(path.strip("/") for path in form.get("paths", []))
    return JSONResponse([entries[path] for path in wanted if path in entries])


@router.get("/api/models/{ns}/{name}/commits/{revision}")
def log(request: Request, ns: str, name: str, revision: str) -> JSONResponse:
    """List the commits up to a revision, last first."""
    access = reading(request, ns, name)
    at = access.repos.resolve(access.name, unslash(revision))
    return JSONResponse(infos.commits(islice(access.repos.history(at), MAX_LOG)))


@router.api_route("/{ns}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
def download(request: Request, ns: str, name: str, revision: str, path: str) -> Response:
    """Send a file."""
    access = downloading(request, ns, name)
    at = access.repos.resolve(access.name, unslash(revision))
    return send_file(request, access.repos, at, unslash(path))


@router.api_route("/{name}/resolve/{_rest:path}", methods=["GET", "HEAD"])
def download_unnamed(request: Request, name: str, _rest: str) -> Response:
    """Answer for names without a namespace (``gpt2``), of which this registry has none."""
    raise repo_not_found(name[:96], anonymous=context_of(request).authority.identify(None).anonymous)
