"""A row ready to be computed: its tokens, and what is applied to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from compose.expr.tree import IDENTITY, Expr, Ref
from hub.errors import HubError, UsageError
from router.dispatch import row_expressions
from router.engine.grammar import CompiledGrammar
from router.engine.host import Host
from router.engine.request import ContextExceeded, Request
from router.engine.targets import Target
from router.router import NO_TASK

MOST = 1024  # tokens written where nothing else bounds them


@dataclass(frozen=True, eq=False)
class PreparedRow:
    """One row.

    `expr` is what is applied to it (a router's choice is in it), `types` are the token types of a pair, `room` is how
    many tokens may be written, and `before` are the tokens that those stand behind: none after an encoder. `pooling` is
    how its states become its vector, where that is wanted.
    """

    request: Request
    target: Target
    ids: tuple[int, ...]
    types: tuple[int, ...] | None
    room: int
    expr: Expr
    before: tuple[int, ...] = ()
    grammar: CompiledGrammar | None = None
    pooling: str | None = None
    weights: dict[str, float] = field(default_factory=dict)

    @property
    def open(self) -> bool:
        """Whether a router has yet to choose for it."""
        return self.target.routing is not None and not self.target.routing.by_token

    @property
    def gate(self) -> Any:
        """The router that weighs each token: rows of one are computed by themselves. Else None."""
        return None if self.open else self.target.routing

    @property
    def places(self) -> int:
        """The most places of a cache that its text takes: what is in front, what is read and what may be written."""
        return self.target.front + len(self.ids) + (self.room if self.generates else 0)

    @property
    def lanes(self) -> int:
        """Rows of a batch that it takes: one, or one for each expert of an ensemble."""
        return 1 if self.target.mixture is None else len(self.target.mixture.experts)

    @property
    def generates(self) -> bool:
        """Whether a continuation is wanted, and not an answer of a head or a vector."""
        return self.target.task == "generate" and self.pooling is None


def prepare(host: Host, request: Request, target: Target) -> PreparedRow:
    """Encode one row.

    A text to classify is cut to what its adapter was trained on; a prompt never is.

    Raises
    ------
    HubError
        An empty text, one that leaves no room for a continuation, or a base that can neither generate nor classify it.
    """
    if target.routing is not None:
        target.routing.router.check_task(request.task)
    elif request.task is not None:
        raise UsageError(NO_TASK, hint="leave the task out, or name a router of the method `task`")
    return _prepared(host, request, target)


def _prepared(host: Host, request: Request, target: Target) -> PreparedRow:
    if request.pooling is not None:
        return _to_embed(host, request, target)
    generates = target.task == "generate"
    if generates and not host.decodes:
        raise UsageError(
            f"{target.text or host.name} has no head, and {host.name} cannot continue a text",
            ref=target.text or None,
            hint="name an adapter that was trained with task: classification",
        )
    if request.prompt_scores and (not generates or target.mixture is not None or host.translates):
        raise UsageError(f"{target.text or host.name} gives no scores of its prompt", hint="leave prompt_scores out")
    if target.read is not None and request.ids is not None:
        raise UsageError(f"{target.text} reads texts, not tokens", ref=target.text, hint="give the text")
    ids, types = _encode(host, request, target)
    _check_tokens(host, [*(request.ids or ()), *(token for token, _ in request.logit_bias)])
    if not ids:
        raise HubError("the text is empty", hint="give at least one token")
    types = None if generates else types
    room = _room(host, request, target.front + len(ids)) if generates else 1
    before = () if host.translates else ids
    grammar = _grammar(host, request, target)
    return PreparedRow(request, target, ids, types, room, target.expr, before, grammar)


def _grammar(host: Host, request: Request, target: Target) -> CompiledGrammar | None:
    if request.grammar is None:
        return None
    if target.task != "generate":
        raise UsageError(f"{target.text} answers with a label, which follows no grammar", hint="leave it out")
    return host.grammars.get(request.grammar)


def _to_embed(host: Host, request: Request, target: Target) -> PreparedRow:
    """A row whose vector is wanted. Raises HubError where there is none, or the text is too long."""
    if host.translates or target.mixture is not None:
        what = f"{target.text} is an ensemble" if target.mixture is not None else f"{host.name} is an encoder-decoder"
        raise UsageError(f"{what}: it has no vectors of texts", hint="name an adapter, or serve an encoder or decoder")
    if target.read is not None:
        told = f"{target.text} answers with labels, through its reader"
        raise UsageError(told, ref=target.text, hint="POST /v1/classify; vectors are the base's")
    ids, types = _encode(host, request, replace(target, task="generate"))
    _check_tokens(host, ids if request.ids is not None else ())
    if not ids:
        raise HubError("the text is empty", hint="give at least one token")
    if host.context is not None and target.front + len(ids) > host.context:
        raise ContextExceeded(
            f"{target.front + len(ids)} tokens are more than the {host.context} that {host.name} reads",
            hint="shorten the text",
        )
    mode = (target.pooling or host.pooling) if request.pooling == "auto" else request.pooling
    return PreparedRow(request, target, ids, None if host.decodes else types, 1, target.expr, pooling=mode)


def with_members(host: Host, row: PreparedRow, weights: dict[str, float]) -> PreparedRow:
    """The row with the members that its router chose; it answers as the one with the largest weight does."""
    assert row.target.routing is not None  # noqa: S101 - a router has chosen
    members = {n: known for n, known in row.target.routing.members.items() if n in weights}  # the base is none of them
    shares = torch.tensor([[weights[name] for name in members]]).double()
    (expr,) = row_expressions([Ref(name) for name in members], shares)
    front = sum(known.front for known in members.values())
    target = Target(row.target.text, expr or IDENTITY, tuple(members), front=front, digest=row.target.digest)
    first = members.get(max(weights, key=weights.__getitem__))
    if first is not None:
        told: dict[str, Any] = {
            "labels": first.labels,
            "task": first.task,
            "max_length": first.max_length,
            "pooling": first.pooling,
        }
        target = replace(target, **told)
    return replace(_prepared(host, row.request, target), weights=weights)


def _room(host: Host, request: Request, read: int) -> int:
    """Tokens that may be written. Raises ContextExceeded where they and the places read are more than the base has."""
    if host.context is None:
        return request.max_new_tokens or MOST
    behind = len(host.starts) if host.translates else read  # a decoder of its own has all its places to itself
    wanted = request.max_new_tokens or max(1, min(host.context - behind, MOST))
    if max(read, behind + wanted) > host.context:
        raise ContextExceeded(
            f"{read} tokens and {wanted} new ones are more than the {host.context} that {host.name} reads",
            hint="shorten the text, or lower max_new_tokens",
        )
    return wanted


def _check_tokens(host: Host, tokens: Sequence[int]) -> None:
    """UsageError for one that the base does not have."""
    most = host.vocabulary
    if wrong := [token for token in tokens if not 0 <= token < most]:
        raise UsageError(f"{host.name} has no token {wrong[0]}", hint=f"its tokens are 0 to {most - 1}")


def _encode(host: Host, request: Request, target: Target) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    if request.ids is not None:
        return request.ids, None
    options: dict[str, Any] = {"add_special_tokens": request.special, "verbose": False}
    context = None if host.context is None else max(1, host.context - target.front)
    limit = min((n for n in (target.max_length, context) if n is not None), default=None)
    if target.task != "generate" and limit is not None:
        options |= {"truncation": True, "max_length": limit}
    with host.encoding:  # a tokenizer keeps how it truncates
        encoded = host.encoder(request.text, request.pair, **options)
    types = tuple(encoded["token_type_ids"]) if "token_type_ids" in encoded else None
    return tuple(encoded["input_ids"]), types
