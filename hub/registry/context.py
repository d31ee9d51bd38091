"""What every route works with, and the one place that decides who may do what."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from functools import cached_property

import anyio
from starlette.requests import Request

from hub.errors import RefError
from hub.ref import AdapterRef
from hub.registry.errors import ApiError, repo_not_found
from hub.registry.limits import Limits
from hub.registry.state.drafts import Repo
from hub.registry.state.lineage import Relations
from hub.registry.state.repositories import Repos
from hub.registry.state.search import StoreSearch
from hub.registry.tokens import Authority, Caller


@dataclass
class Context:
    """A running registry.

    Attributes
    ----------
    repos
        What it serves.
    authority
        Who may do what.
    limits
        How much it takes.
    secret
        Key of the upload links this process signs.
    """

    repos: Repos
    authority: Authority
    limits: Limits = field(default_factory=Limits)
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))

    @cached_property
    def search(self) -> StoreSearch:
        """The catalogue."""
        return StoreSearch(self.repos.store)

    @cached_property
    def relations(self) -> Relations:
        """Who comes from whom."""
        return Relations(self.repos.store)

    @cached_property
    def uploads(self) -> anyio.CapacityLimiter:
        """Slots for uploads in progress."""
        return anyio.CapacityLimiter(self.limits.uploads)


@dataclass(frozen=True)
class Access:
    """A repository that the caller may see."""

    name: str
    repo: Repo
    caller: Caller
    context: Context

    @property
    def repos(self) -> Repos:
        """What the registry serves."""
        return self.context.repos

    @property
    def writable(self) -> bool:
        """Whether the caller may change it."""
        return self.caller.may_write(self.name.split("/")[0])


def context_of(request: Request) -> Context:
    """Return the registry that answers a request."""
    context: Context = request.app.state.registry
    return context


def caller_of(request: Request) -> Caller:
    """Return who asks. ApiError (401) for invalid credentials, and for a browser's password that would write."""
    authorization = request.headers.get("authorization")
    if request.method not in ("GET", "HEAD") and (authorization or "").lower().startswith("basic"):
        raise ApiError(401, "Basic credentials read only, since browsers send them unasked: send a Bearer token")
    return context_of(request).authority.identify(authorization)


def repo_name(namespace: str, name: str) -> str | None:
    """``ns/name``, or None where no repository can be called so."""
    try:
        return AdapterRef(namespace, name).id
    except RefError:
        return None


def reading(request: Request, namespace: str, name: str) -> Access:
    """Let the caller see a repository, or raise what the Hugging Face Hub answers."""
    caller, context = caller_of(request), context_of(request)
    known = repo_name(namespace, name)
    repo = context.repos.find(known) if known else None
    readable = caller.may_read(namespace)
    visible = repo is not None and (readable or (caller.public and not repo.private))
    if repo is None or not visible:
        raise repo_not_found(f"{namespace[:96]}/{name[:96]}", anonymous=caller.anonymous)
    return Access(repo.name, repo, caller, context)


def downloading(request: Request, namespace: str, name: str) -> Access:
    """As `reading`, and the files as well: those of a gated repository need read access."""
    access = reading(request, namespace, name)
    if access.repo.gated and not access.caller.may_read(namespace):
        status = 401 if access.caller.anonymous else 403
        raise ApiError(status, f"Access to {access.name} is restricted: ask its owner for a token", code="GatedRepo")
    return access


def writing(request: Request, namespace: str, name: str) -> Access:
    """Let the caller change a repository."""
    access = reading(request, namespace, name)
    require_write(access.caller, namespace)
    return access


def require_write(caller: Caller, namespace: str) -> None:
    """Raise 401 (no token) or 403 (not theirs) unless the caller may write in a namespace."""
    if caller.anonymous:
        raise ApiError(401, "Send a token with write access (HF_TOKEN, or `hf auth login`)")
    if not caller.may_write(namespace):
        raise ApiError(403, f"token {caller.name!r} has no write access to {namespace[:96]}")
