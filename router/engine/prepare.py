"""A row ready to be computed: its tokens, and what is applied to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from compose.expr import Expr
from hub.errors import HubError, UsageError
from router.engine.host import Host
from router.engine.request import Request
from router.engine.targets import Target

MOST = 1024  # tokens written where nothing else bounds them


@dataclass(frozen=True, eq=False)
class Prepared:
    """One row.

    `expr` is what is applied to it (a router's choice is in it), `types` are the token types of a pair, `room` is how
    many tokens may be written.
    """

    request: Request
    target: Target
    ids: tuple[int, ...]
    types: tuple[int, ...] | None
    room: int
    expr: Expr
    weights: dict[str, float] = field(default_factory=dict)

    @property
    def open(self) -> bool:
        """Whether a router has yet to choose for it."""
        return self.target.routing is not None and not self.target.routing.by_token

    @property
    def gate(self) -> Any:
        """The ensemble, or the router that weighs each token: rows of one are computed by themselves. Else None."""
        return self.target.mixture or (None if self.open else self.target.routing)

    @property
    def generates(self) -> bool:
        """Whether a continuation is wanted, and not an answer of a head."""
        return self.target.task == "generate"


def prepare(host: Host, request: Request, target: Target) -> Prepared:
    """Encode one row.

    A text to classify is cut to what its adapter was trained on; a prompt never is.

    Raises
    ------
    HubError
        An empty text, one that leaves no room for a continuation, or a base that can neither generate nor classify it.
    """
    generates = target.task == "generate"
    if generates and not host.decodes:
        raise UsageError(
            f"{target.text or host.name} has no head, and {host.name} cannot continue a text",
            ref=target.text or None,
            hint="name an adapter that was trained with task: classification",
        )
    if target.mixture is not None:
        target.mixture.check(request)
    ids, types = _encode(host, request, target)
    if not ids:
        raise HubError("the text is empty", hint="give at least one token")
    left = MOST if host.context is None else host.context - len(ids)
    wanted = request.max_new_tokens or max(1, min(left, MOST))
    if generates and wanted > left and host.context is not None:
        raise HubError(
            f"{len(ids)} tokens and {wanted} new ones are more than the {host.context} that {host.name} reads",
            hint="shorten the text, or lower max_new_tokens",
        )
    return Prepared(request, target, ids, None if generates else types, wanted, target.expr)


def _encode(host: Host, request: Request, target: Target) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    options: dict[str, Any] = {"add_special_tokens": request.special, "verbose": False}
    limit = min((n for n in (target.max_length, host.context) if n is not None), default=None)
    if target.task != "generate" and limit is not None:
        options |= {"truncation": True, "max_length": limit}
    with host.encoding:  # a tokenizer keeps how it truncates
        encoded = host.encoder(request.text, request.pair, **options)
    types = tuple(encoded["token_type_ids"]) if "token_type_ids" in encoded else None
    return tuple(encoded["input_ids"]), types
