"""Repositories: list, describe, make, change, delete; their branches and tags."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import JSONResponse

from hub.ref import AdapterRef, name_key
from hub.registry.context import caller_of, context_of, reading, require_write, writing
from hub.registry.errors import ApiError, repo_not_found
from hub.registry.guard import unslash
from hub.registry.protocol import infos
from hub.registry.protocol.account import JsonBody
from hub.registry.state import changes, publish
from hub.registry.state.search import visible
from hub.storage.index import Facts

router = APIRouter()
MAX_PAGE = 1000
_VISIBILITIES = ("public", "private", "protected")


@router.get("/api/models")
def list_models(
    request: Request,
    search: Annotated[str | None, Query(max_length=200)] = None,
    author: Annotated[str | None, Query(max_length=96)] = None,
    pipeline_tag: Annotated[str | None, Query(max_length=64)] = None,
    sort: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
    skip: Annotated[int, Query(ge=0, le=10**7)] = 0,
) -> JSONResponse:
    """List the repositories that the caller may see, by name or (``sort``) the newest first."""
    context, caller = context_of(request), caller_of(request)
    wanted = [tag for value in request.query_params.getlist("filter") for tag in value.split(",") if tag]
    if pipeline_tag:
        wanted.append(pipeline_tag)
    recorded = context.repos.recorded()
    base = next(
        (tag.split(":", 1)[1].removeprefix("adapter:") for tag in wanted if tag.startswith("base_model:")), None
    )
    order = "created" if sort in ("lastModified", "createdAt") else None
    enough = -1 if wanted or search else skip + limit + 1  # what only Python can decide needs all of them
    facts, total = context.search.select({"namespace": author, "base": base}, order, caller, recorded, enough)
    items = [infos.listed(each, recorded.of(each.name)) for each in facts if _fits(each, search, wanted)]
    if not wanted and len(facts) == total:
        items += _drafts(request, {name_key(each.name) for each in facts}, search, author)
    headers = {}
    if len(items) > skip + limit:
        query = [(key, value) for key, value in request.query_params.multi_items() if key != "skip"]
        url = f"{request.url.replace(query=urlencode([*query, ('skip', str(skip + limit))]))}"
        headers["Link"] = f'<{url}>; rel="next"'
    return JSONResponse(items[skip : skip + limit], headers=headers)


def _fits(facts: Facts, search: str | None, wanted: list[str]) -> bool:
    return (not search or search.lower() in facts.name.lower()) and set(wanted) <= set(infos.tags_of(facts))


def _drafts(request: Request, published: set[str], search: str | None, author: str | None) -> list[dict[str, Any]]:
    context, caller = context_of(request), caller_of(request)
    recorded = context.repos.recorded()
    names = (name for name in sorted(recorded) if name not in published and visible(caller, name, recorded))
    return [
        infos.listed_draft(recorded[name])
        for name in names
        if (not search or search.lower() in name) and (not author or name.startswith(name_key(f"{author}/")))
    ]


@router.get("/api/models/{ns}/{name}")
def describe(request: Request, ns: str, name: str, blobs: Annotated[bool, Query()] = False) -> JSONResponse:
    """Describe main."""
    return describe_revision(request, ns, name, "main", blobs)


@router.get("/api/models/{ns}/{name}/revision/{revision}")
def describe_revision(
    request: Request, ns: str, name: str, revision: str, blobs: Annotated[bool, Query()] = False
) -> JSONResponse:
    """Describe a revision."""
    access = reading(request, ns, name)
    at = access.repos.resolve(access.name, unslash(revision))
    return JSONResponse(infos.described(access, at, blobs=blobs))


@router.get("/api/models/{ns}/{name}/refs")
def refs(request: Request, ns: str, name: str) -> JSONResponse:
    """List branches and tags; yanked versions are among the ``converts``, the refs that are kept but not offered."""
    access = reading(request, ns, name)
    all_refs = access.repos.refs(access.name)

    def named(kind: str, refs: dict[str, str], prefix: str = "") -> list[dict[str, str]]:
        return [
            {"name": prefix + name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in refs.items()
        ]

    return JSONResponse(
        {
            "branches": named("heads", all_refs.branches),
            "tags": named("tags", all_refs.tags),
            "converts": named("yanked", all_refs.yanked, "yanked/"),
            "pullRequests": [],
        }
    )


@router.post("/api/repos/create")
def create(request: Request, body: JsonBody) -> JSONResponse:
    """Make a repository."""
    caller, context = caller_of(request), context_of(request)
    if body.get("type") not in (None, "model"):
        raise ApiError(400, f"this registry holds adapters: no repositories of type {str(body['type'])[:20]!r}")
    namespace, short = str(body.get("organization") or caller.home), str(body.get("name", ""))
    require_write(caller, namespace)
    name = AdapterRef(namespace, short).id  # what cannot be one is answered with what it could be
    url = f"{request.base_url}{name}"
    try:
        changes.create_repo(context.repos, name, visibility=_visibility(body) or context.repos.visibility)
    except ApiError as error:
        if error.status != 409:
            raise
        # A client that does not mind that it exists reads the url of this very answer.
        answer = {"error": error.message, "url": url, "name": name, "id": name}
        return JSONResponse(answer, 409, error.headers)
    return JSONResponse({"url": url, "name": name, "id": name})


@router.delete("/api/repos/delete")
def delete(request: Request, body: JsonBody) -> JSONResponse:
    """Delete a repository."""
    caller = caller_of(request)
    namespace = str(body.get("organization") or caller.home)
    access = writing(request, namespace, str(body.get("name", "")))
    changes.delete_repo(access.repos, access.name, who=caller.name or "anonymous")
    return JSONResponse({})


@router.put("/api/models/{ns}/{name}/settings")
def settings(request: Request, ns: str, name: str, body: JsonBody) -> JSONResponse:
    """Change who may see a repository."""
    access = writing(request, ns, name)
    gated = body.get("gated")
    if gated not in (None, False, "auto", "manual"):
        raise ApiError(400, "gated is false, auto or manual")
    repo = changes.change_settings(
        access.repos, access.name, visibility=_visibility(body), gated=None if gated is None else gated or ""
    )
    return JSONResponse({"private": repo.private, "gated": repo.gated or False})


@router.post("/api/repos/move")
def move(request: Request, body: JsonBody) -> JSONResponse:
    """Rename a repository; one with versions keeps its name, which is part of the identity of what was published."""
    old, new = (AdapterRef.parse(str(body.get(field, ""))) for field in ("fromRepo", "toRepo"))
    access = writing(request, old.namespace, old.name)
    require_write(access.caller, new.namespace)
    changes.move_repo(access.repos, access.name, new.id)
    return JSONResponse({})


@router.post("/api/models/{ns}/{name}/branch/{branch}")
def create_branch(request: Request, ns: str, name: str, branch: str, body: JsonBody) -> JSONResponse:
    """Make a branch."""
    access = writing(request, ns, name)
    changes.create_branch(access.repos, access.name, unslash(branch), str(body.get("startingPoint") or "main"))
    return JSONResponse({})


@router.delete("/api/models/{ns}/{name}/branch/{branch}")
def delete_branch(request: Request, ns: str, name: str, branch: str) -> JSONResponse:
    """Remove a branch."""
    access = writing(request, ns, name)
    changes.delete_branch(access.repos, access.name, unslash(branch))
    return JSONResponse({})


@router.post("/api/models/{ns}/{name}/tag/{revision}")
def create_tag(request: Request, ns: str, name: str, revision: str, body: JsonBody) -> JSONResponse:
    """Tag a revision; a version publishes it."""
    access = writing(request, ns, name)
    tag = str(body.get("tag", ""))
    tagged = publish.create_tag(access.repos, access.name, tag, unslash(revision), access.caller)
    digest = tagged.release.digest if tagged.release else None
    return JSONResponse({"name": tag, "targetCommit": tagged.oid, "digest": digest})


@router.delete("/api/models/{ns}/{name}/tag/{tag}")
def delete_tag(request: Request, ns: str, name: str, tag: str) -> JSONResponse:
    """Take a tag away; a version is yanked."""
    access = writing(request, ns, name)
    publish.delete_tag(access.repos, access.name, unslash(tag), access.caller)
    return JSONResponse({})


@router.api_route("/api/{rest:path}", methods=["GET", "HEAD", "POST", "PUT", "DELETE"])
def unknown(request: Request, rest: str) -> JSONResponse:
    """Answer for repositories of other types, names without a namespace, and what this registry does not do."""
    kind, _, name = rest.partition("/")
    if kind in ("models", "datasets", "spaces", "kernels"):
        raise repo_not_found(name[:96], anonymous=caller_of(request).anonymous)
    raise ApiError(404, f"this registry does not speak /api/{rest[:100]}")


def _visibility(body: dict[str, Any]) -> str | None:
    visibility = body.get("visibility")
    if visibility is None and "private" in body:
        visibility = "private" if body["private"] else "public"
    if visibility is not None and visibility not in _VISIBILITIES:
        raise ApiError(400, f"visibility is one of {', '.join(_VISIBILITIES)}")
    return visibility
