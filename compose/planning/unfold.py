"""Expand composition artifacts in place: a ref to one becomes the expression it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from compose.algebra import parse
from compose.errors import CompositionCycle, ExpressionError, MissingRequirement
from compose.expr.tree import Expr, Ref, substitute
from hub.errors import NotFound, RefError
from hub.manifest import BaseIdentity, Requirement
from hub.ref import AdapterRef, name_key

MAX_NESTING = 32


class Resolved(Protocol):
    """What the plan needs to know of a ref. A manifest answers all of it."""

    @property
    def type(self) -> str:
        """``adapter``, ``merge``, ``composition`` or ``router``."""

    @property
    def kind(self) -> str:
        """Kind of an adapter: ``lora``, ``ia3``, ..."""

    @property
    def base(self) -> BaseIdentity | None:
        """The base it was made for, where known."""

    @property
    def placement(self) -> Sequence[str]:
        """Paths of the modules it acts on."""

    @property
    def labels(self) -> Sequence[str]:
        """Names of the classes of its head, if it has one."""

    @property
    def hyperparameters(self) -> Mapping[str, Any]:
        """Its config; ``modules_to_save`` names the modules it replaces."""

    @property
    def expression(self) -> str | None:
        """The text of a composition."""


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
    MissingRequirement
        What a composition requires is not here: both are named.
    """
    unfolder = _Unfolder(resolve)
    return unfolder.tree(expr, (), ()), unfolder.leaves


class _Unfolder:
    def __init__(self, resolve: Callable[[str], Resolved]) -> None:
        self._resolve = resolve
        self._known: dict[str, Resolved] = {}
        self._texts: dict[str, str] = {}  # digest of an adapter -> how its ref was first written
        self.leaves: dict[str, Resolved] = {}

    def tree(self, expr: Expr, path: tuple[str, ...], requires: Sequence[Requirement]) -> Expr:
        return substitute(expr, lambda ref: self._leaf(_pinned(ref, requires), path))

    def _leaf(self, ref: Ref, path: tuple[str, ...]) -> Expr:
        text = ref.text
        if text not in self._known:
            self._known[text] = self._resolve(text)
        found = self._known[text]
        if found.type != "composition":
            text = self._first(text, found)
            self.leaves[text] = self._known[text]
            return Ref(text)
        name = getattr(found, "digest", None) or text  # one composition may be named in several ways
        names = [step.partition(" ")[0] for step in path]
        if name in names:
            circle = [step.partition(" ")[2] for step in path[names.index(name) :]] + [text]
            raise CompositionCycle(f"composition {text} contains itself: {' -> '.join(circle)}", ref=text)
        if len(path) >= MAX_NESTING:
            raise CompositionCycle(f"compositions are nested more than {MAX_NESTING} deep at {text}", ref=text)
        return self._inside(text, found, (*path, f"{name} {text}"))

    def _first(self, text: str, found: Resolved) -> str:
        """One text for each artifact, however its ref is written; a name that the caller has given stays as it is."""
        digest, name = getattr(found, "digest", None), getattr(found, "name", None)
        if digest is None or name is None:
            return text
        try:
            same = name_key(AdapterRef.parse(text).id) == name_key(name)
        except RefError:
            return text
        return self._texts.setdefault(digest, text) if same else text

    def _inside(self, text: str, found: Resolved, path: tuple[str, ...]) -> Expr:
        try:
            return self.tree(parse(found.expression or ""), path, getattr(found, "requires", ()))
        except ExpressionError as error:
            raise ExpressionError(f"in composition {text}: {error.message}", ref=text, hint=error.hint) from error
        except MissingRequirement:
            raise  # named by the composition inside this one
        except NotFound as error:
            needed = error.ref or "an adapter"
            hint = f"bring it with its composition: hub pull {text} --from URL|PATH"
            message = f"composition {text} requires {_named(needed, found)}, which is not here"
            raise MissingRequirement(message, ref=needed, digest=error.digest, hint=hint) from error


def _named(ref: str, composition: Resolved) -> str:
    """A requirement by name and range, which say more than the digest it is pinned by."""
    for need in getattr(composition, "requires", ()):
        if need.digest is not None and ref == f"{need.name}@{need.digest}":
            return f"{need.name}{need.range or ''} ({need.digest[:19]}...)"
    return ref


def _pinned(ref: Ref, requires: Sequence[Requirement]) -> Ref:
    try:
        parsed = AdapterRef.parse(ref.text)
    except RefError:
        return ref  # the name of an adapter in memory
    digest = next((r.digest for r in requires if name_key(r.name) == name_key(parsed.id) and r.digest), None)
    if digest is None or parsed.digest is not None:
        return ref
    return Ref(str(parsed.at(digest=digest)))
