"""The web catalogue: search, an adapter's page, and refusals that people can read. Works without JavaScript."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from hub.errors import UsageError
from hub.io.files import sha256_file
from hub.registry.context import Access, caller_of, context_of, downloading, reading
from hub.registry.errors import ApiError
from hub.registry.guard import unslash
from hub.registry.state.search import Query as Wanted
from hub.registry.web.page import Page, build
from hub.registry.web.wording import FILTERS

router = APIRouter(include_in_schema=False)
_pages = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_pages.filters.update(FILTERS)
STATIC = Path(__file__).parent / "static"
_SORTS = {"created": "Newest first", "name": "Name", "size": "Largest first"}


@cache
def asset(name: str) -> str:
    """Address of a static file; it changes with the file's bytes, so that no browser shows an old one."""
    return f"/static/{name}?v={sha256_file(STATIC / name)[0][:12]}"


_pages.globals["asset"] = asset


def html(template: str, status: int = 200, headers: dict[str, str] | None = None, **values: Any) -> HTMLResponse:
    """Fill a template."""
    all_headers = {"Cache-Control": "private, no-cache", **(headers or {})}
    return HTMLResponse(_pages.get_template(template).render(**values), status, all_headers)


@router.get("/")
def catalogue(
    request: Request,
    q: Annotated[str, Query(max_length=200)] = "",
    base: Annotated[str, Query(max_length=256)] = "",
    kind: Annotated[str, Query(max_length=64)] = "",
    task: Annotated[str, Query(max_length=256)] = "",
    metric: Annotated[str, Query(max_length=256)] = "",
    ns: Annotated[str, Query(max_length=96)] = "",
    sort: Annotated[str, Query(max_length=16)] = "created",
    page: Annotated[int, Query(ge=1, le=10_000)] = 1,
) -> Response:
    """Search and filter."""
    caller, context = caller_of(request), context_of(request)
    if not caller.public and caller.anonymous:
        raise ApiError(401, "This registry shows its catalogue to holders of a token only")
    wanted = Wanted(q.strip(), base, kind, task, metric, ns, sort if sort in _SORTS else "created", page)
    recorded = context.repos.recorded()
    problem, results = "", None
    try:
        results = context.search.find(wanted, caller, recorded)
    except UsageError as error:  # a query of marks alone
        problem = error.message
    shown = results.facts if results else []
    return html(
        "catalogue.html",
        caller=caller,
        wanted=wanted,
        problem=problem,
        facets=context.search.facets(caller, recorded),
        found=shown,
        scores=context.search.scores(facts.digest for facts in shown),
        private={facts.name for facts in shown if recorded.of(facts.name).private},
        total=results.total if results else 0,
        sorts=_SORTS,
        older=_link(wanted, page=page + 1) if results and results.more else None,
        newer=_link(wanted, page=page - 1) if page > 1 else None,
        active=[(name, value, _link(wanted, **{name: ""}, page=1)) for name, value in _active(wanted)],
        endpoint=_endpoint(request),
    )


def _active(wanted: Wanted) -> list[tuple[str, str]]:
    filters = [(name, getattr(wanted, name)) for name in ("text", "namespace", "base", "kind", "task", "metric")]
    return [(name, value) for name, value in filters if value]


def _link(wanted: Wanted, **changes: Any) -> str:
    names = {"text": "q", "namespace": "ns"}
    values = {**vars(wanted), **changes}
    query = {names.get(name, name): value for name, value in values.items() if value and value not in ("created",)}
    if query.get("page") == 1:
        del query["page"]
    return f"/?{urlencode(query)}" if query else "/"


@router.get("/-/health")
def health(request: Request) -> JSONResponse:
    """Say that the store and the drafts can be read."""
    context = context_of(request)
    context.repos.recorded()
    return JSONResponse({"ok": True, "log": context.repos.store.ledger.size})


@router.get("/-/login")
def login(request: Request) -> Response:
    """Let the browser ask for a token (as a password; the user name does not matter)."""
    if caller_of(request).anonymous:
        headers = {"WWW-Authenticate": 'Basic realm="moduloom registry: any name, token as password"'}
        raise ApiError(401, "Give a token as the password", headers=headers)
    return RedirectResponse("/", 303)


@router.get("/favicon.ico")
def icon() -> Response:
    """Lead to the icon."""
    return RedirectResponse("/static/icon.svg", 301)


@router.get("/{ns}")
def namespace(ns: str) -> Response:
    """Show a namespace as a filtered catalogue."""
    return RedirectResponse(f"/?{urlencode({'ns': ns[:96]})}", 303)


@router.get("/{ns}/{name}")
def adapter(request: Request, ns: str, name: str) -> Response:
    """Page of main."""
    return _adapter(request, ns, name, "main")


@router.get("/{ns}/{name}/tree/{revision}")
def adapter_at(request: Request, ns: str, name: str, revision: str) -> Response:
    """Page of a revision."""
    return _adapter(request, ns, name, revision)


@router.get("/{ns}/{name}/commit/{revision}")
def adapter_of_commit(request: Request, ns: str, name: str, revision: str) -> Response:
    """Page of a commit; clients print this address after an upload."""
    return _adapter(request, ns, name, revision)


@router.get("/{ns}/{name}/blob/{revision}/{path:path}")
def blob(request: Request, ns: str, name: str, revision: str, path: str) -> Response:
    """Lead to the file itself."""
    access = downloading(request, ns, name)
    at = access.repos.resolve(access.name, unslash(revision))
    at.file(unslash(path))
    return RedirectResponse(f"/{access.name}/resolve/{at.oid}/{path}", 303)


def _adapter(request: Request, ns: str, name: str, revision: str) -> Response:
    access = reading(request, ns, name)
    at = access.repos.resolve(access.name, unslash(revision))
    page: Page = build(access, at, _may_download(access, ns))
    return html("adapter.html", caller=access.caller, page=page, endpoint=_endpoint(request))


def _may_download(access: Access, namespace: str) -> bool:
    return not access.repo.gated or access.caller.may_read(namespace)


def _endpoint(request: Request) -> str:
    return str(request.base_url).rstrip("/")


def refusal(request: Request, error: ApiError) -> Response:
    """Answer for an error: a page where a person looks, JSON everywhere else."""
    wants_page = "text/html" in request.headers.get("accept", "") and not request.url.path.startswith("/api/")
    if not wants_page:
        return JSONResponse({"error": error.message}, error.status, error.headers)
    anonymous = error.status == 401
    return html("error.html", error.status, error.headers, error=error, anonymous=anonymous, caller=None)
