"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}` and a status."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from pydantic import ValidationError

from hub.errors import Conflict, HubError, NotFound
from router.engine.grammar import GrammarError
from router.engine.job import BrokeDown, ServerBusy, ServerStopped, TooLarge
from router.engine.request import ContextExceeded

LATER = {"Retry-After": "1"}  # seconds; a place becomes free whenever a row ends
Told: TypeAlias = tuple[int, dict[str, dict[str, Any]]]


class FieldError(HubError):
    """A field of a request that cannot be taken; `param` is its name."""

    def __init__(self, param: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.param = param


# The first class that an error is of: status, type, parameter, code.
_ERRORS: tuple[tuple[type[HubError], int, str, str | None, str | None], ...] = (
    (ServerBusy, 429, "rate_limit_error", None, "rate_limit_exceeded"),
    (TooLarge, 429, "rate_limit_error", None, "request_too_large"),
    (ServerStopped, 503, "server_error", None, "stopped"),
    (BrokeDown, 500, "server_error", None, "internal_error"),
    (ContextExceeded, 400, "invalid_request_error", "prompt", "context_length_exceeded"),
    (NotFound, 404, "invalid_request_error", "model", "model_not_found"),
    (Conflict, 409, "invalid_request_error", None, None),
    (HubError, 400, "invalid_request_error", None, None),
)


class Errors:
    """Words for errors, without what is nobody's business.

    Parameters
    ----------
    hidden
        Places on this machine, which no answer names.
    """

    def __init__(self, hidden: Sequence[str]) -> None:
        self._hidden = tuple(hidden)

    def of(self, error: Exception, text_field: str = "prompt") -> Told:
        """Status and body of an error; `text_field` is where the endpoint's request has its text."""
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            param = ".".join(str(part) for part in first["loc"]) or None
            return 400, _body(f"{param or 'the body'}: {first['msg']}", param=param)
        for cls, status, kind, where, code in _ERRORS:
            if isinstance(error, cls):
                param = (
                    error.param
                    if isinstance(error, FieldError | GrammarError)
                    else text_field
                    if where == "prompt"
                    else where
                )
                return status, _body(self._sentence(error), kind=kind, param=param, code=code)
        return 500, _body(type(error).__name__, kind="server_error", code="internal_error")

    def _sentence(self, error: HubError) -> str:
        said = f"{error.message} ({error.hint})" if error.hint else error.message
        for place in self._hidden:
            said = said.replace(f"the store {place}", "the store").replace(place, "...")
        return said


def may_retry(code: object) -> bool:
    """Whether the same request may be answered later."""
    return code in ("rate_limit_exceeded", "stopped")


def refusal(status: int, message: str, code: str) -> Told:
    """A refusal that no exception stands for."""
    kind = "authentication_error" if status == 401 else "invalid_request_error"
    return status, _body(message, kind=kind, code=code)


def _body(
    message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, dict[str, Any]]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
