"""Expand composition artifacts in place: a ref to one becomes the expression it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from compose.expr import Expr, Ref, parse, substitute
from compose.tokens import ExpressionError
from hub.errors import HubError, RefError
from hub.manifest import Requirement
from hub.ref import AdapterRef

if TYPE_CHECKING:
    from compose.plan import Resolved

MAX_NESTING = 32


class CompositionCycle(HubError):
    """A composition that contains itself."""


def unfold(expr: Expr, resolve: Callable[[str], Resolved]) -> tuple[Expr, Mapping[str, Resolved]]:
    """Return the tree without compositions, and what each of its refs resolved to.

    A ref inside a composition that the composition ``requires`` by digest is read as that digest, so a composition
    means tomorrow what it meant when it was published.

    Raises
    ------
    CompositionCycle
        Naming the compositions in the circle.
    ExpressionError
        The expression inside a composition does not parse, or the whole grows too large.
    """
    unfolder = _Unfolder(resolve)
    return unfolder.tree(expr, (), ()), unfolder.leaves


class _Unfolder:
    def __init__(self, resolve: Callable[[str], Resolved]) -> None:
        self._resolve = resolve
        self._known: dict[str, Resolved] = {}
        self.leaves: dict[str, Resolved] = {}

    def tree(self, expr: Expr, path: tuple[str, ...], requires: Sequence[Requirement]) -> Expr:
        return substitute(expr, lambda ref: self._leaf(_pinned(ref, requires), path))

    def _leaf(self, ref: Ref, path: tuple[str, ...]) -> Expr:
        text = ref.text
        if text not in self._known:
            self._known[text] = self._resolve(text)
        found = self._known[text]
        if found.type != "composition":
            self.leaves[text] = found
            return ref
        name = getattr(found, "digest", None) or text  # one composition may be named in several ways
        names = [step.partition(" ")[0] for step in path]
        if name in names:
            circle = [step.partition(" ")[2] for step in path[names.index(name) :]] + [text]
            raise CompositionCycle(f"composition {text} contains itself: {' -> '.join(circle)}", ref=text)
        if len(path) >= MAX_NESTING:
            raise CompositionCycle(f"compositions are nested more than {MAX_NESTING} deep at {text}", ref=text)
        return self._inside(text, found, (*path, f"{name} {text}"))

    def _inside(self, text: str, found: Resolved, path: tuple[str, ...]) -> Expr:
        try:
            return self.tree(parse(found.expression or ""), path, getattr(found, "requires", ()))
        except ExpressionError as error:
            raise ExpressionError(f"in composition {text}: {error.message}", ref=text, hint=error.hint) from error


def _pinned(ref: Ref, requires: Sequence[Requirement]) -> Ref:
    try:
        parsed = AdapterRef.parse(ref.text)
    except RefError:
        return ref  # the name of an adapter in memory
    digest = next((r.digest for r in requires if r.name == parsed.id and r.digest), None)
    if digest is None or parsed.digest is not None:
        return ref
    return Ref(str(parsed.at(digest=digest)))
