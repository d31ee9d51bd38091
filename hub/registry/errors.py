"""What the registry answers when it refuses: a status, ``X-Error-Code`` and one clear sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from hub.errors import (
    Conflict,
    GateError,
    HubError,
    IntegrityError,
    ManifestError,
    NotFound,
    RefError,
    StoreError,
    UsageError,
)

MAX_HEADER = 400  # characters of a message that travel as a header

# The nearest base class counts. What the caller sent is 4xx; a damaged or unreachable store is 5xx.
_STATUS: dict[type[HubError], int] = {
    RefError: 400,
    UsageError: 400,
    GateError: 400,
    ManifestError: 400,
    IntegrityError: 500,
    Conflict: 409,
    NotFound: 404,
    StoreError: 503,
    HubError: 500,
}


class ApiError(Exception):
    """An answer that is not 2xx.

    Parameters
    ----------
    status
        The HTTP status.
    message
        One sentence, shown by the client.
    code
        ``X-Error-Code``: what `huggingface_hub` raises by (RepoNotFound, RevisionNotFound, EntryNotFound,
        GatedRepo).
    headers
        More headers.
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = {"X-Error-Message": header_text(message), **(headers or {})}
        if code is not None:
            self.headers["X-Error-Code"] = code


def from_hub(error: HubError) -> ApiError:
    """Return the answer for an error of the store."""
    status = next(_STATUS[base] for base in type(error).__mro__ if base in _STATUS)
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    return ApiError(status, message)


def without_paths(error: ApiError, roots: Iterable[Path]) -> ApiError:
    """The same answer without directories of the server: of a path below one of them, its last part is left."""
    message = error.message
    for root in sorted({str(root) for root in roots}, key=len, reverse=True):
        below = re.escape(root) + r"((?:/[^/\s'\":;,()]+)*)/?"
        message = re.sub(below, lambda match: match[1].rpartition("/")[2] or "the store", message)
    if message == error.message:
        return error
    headers = {name: value for name, value in error.headers.items() if name != "X-Error-Message"}
    return ApiError(error.status, message, headers=headers)


def header_text(text: str) -> str:
    """Text as the value of a header: printable ASCII on one line, cut to `MAX_HEADER`."""
    return "".join(mark if " " <= mark <= "~" else "?" for mark in text[:MAX_HEADER])


def repo_not_found(name: str, *, anonymous: bool) -> ApiError:
    """Answer alike for a repository that is not there and one that the caller may not see.

    As on the Hugging Face Hub: 401 without a token (with one, it might be there), 404 with a token.
    """
    if anonymous:
        return ApiError(401, f"There is no repository {name}, or it is private: send a token", code="RepoNotFound")
    return ApiError(404, f"There is no repository {name} here, or it is not yours to see", code="RepoNotFound")


def revision_not_found(name: str, revision: str, hint: str | None = None) -> ApiError:
    """Answer for an unknown branch, tag, version, alias or commit."""
    more = f" ({hint})" if hint else ""
    return ApiError(404, f"{name} has no revision {revision[:100]!r}{more}", code="RevisionNotFound")


def entry_not_found(name: str, path: str, oid: str) -> ApiError:
    """Answer for a file that a revision does not hold; it names the commit, which clients cache."""
    return ApiError(
        404, f"{name} has no file {path[:200]!r} at {oid[:12]}", code="EntryNotFound", headers={"X-Repo-Commit": oid}
    )


def too_large(what: str, limit: int) -> ApiError:
    """Answer for a body, a file or a list over its limit."""
    return ApiError(413, f"{what} is over the limit of {limit} bytes")
