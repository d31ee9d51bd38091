"""Composition expressions: a frozen, hashable tree over adapters.

    expr := ref | c * expr | expr + expr | expr >> expr | f(expr, ..., option=value) | identity

``a + b`` adds both effects on the same base; ``a >> b`` applies b to the model already adapted by a; ``c * e`` is the
base plus c times what e changes. Text, JSON and Python operators are three spellings of one tree.

Laws: ``parse(str(e)) == e`` and ``from_json(to_json(e)) == e`` for every tree ``e``; trees that differ only in the
order, nesting or splitting of sums have one :func:`digest` (all four are in ``compose.algebra``).

A tree holds at most ``MAX_NODES`` nodes in ``MAX_DEPTH`` levels, checked as each node is made, so nothing that walks a
tree needs to fear its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias, cast

from compose.errors import ExpressionError
from compose.expr.tokens import IDENTITY_WORD, quote, string

Value: TypeAlias = "bool | int | float | str | tuple[Value, ...] | None"

MAX_NODES = 2_000
MAX_DEPTH = 64
MAX_NAME = 512  # characters of one ref; the longest that names an artifact is a digest ref
_MAX_INT = 2**53  # larger integers have no exact JSON number


def _expr(value: object) -> Expr:
    if not isinstance(value, Expr) or type(value) is Expr:
        raise ExpressionError(f"{value!r} is not an expression", hint="wrap the name of an adapter in Ref(...)")
    return value


def _splice(parts: Iterable[Expr], kind: type[Add] | type[Seq]) -> tuple[Expr, ...]:
    flat: list[Expr] = []
    for part in parts:
        flat.extend(part.children if isinstance(_expr(part), kind) else (part,))
    return tuple(flat)


def _finite(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ExpressionError(f"{value!r} is not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ExpressionError(f"a weight must be a finite number, not {number}")
    return number


def _value(value: object, what: str, level: int = 0) -> Value:
    if isinstance(value, list | tuple):
        if level >= 4 or len(value) > MAX_NODES:
            raise ExpressionError(f"the list given to {what} is too {'deep' if level >= 4 else 'long'}")
        return tuple(_value(item, what, level + 1) for item in value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ExpressionError(f"{what} must be finite, not {value}")
    if isinstance(value, int) and abs(value) > _MAX_INT:
        raise ExpressionError(f"{what} is beyond 2**53")
    if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
        raise ExpressionError(f"{what} is not Unicode text (it holds half a surrogate pair)")
    if value is None or isinstance(value, bool | int | float | str):
        return cast("Value", value)
    raise ExpressionError(f"{what} is a {type(value).__name__}", hint="options are numbers, strings and lists of them")


@dataclass(frozen=True)
class Expr:
    """A node of the tree. Use the subclasses, or the operators ``+  -  *  >>`` on trees."""

    size: int = field(default=1, init=False, compare=False, repr=False)
    depth: int = field(default=1, init=False, compare=False, repr=False)

    @property
    def children(self) -> tuple[Expr, ...]:
        """Direct sub-expressions, in order."""
        return ()

    def _measure(self) -> None:
        size = 1 + sum(child.size for child in self.children)
        depth = 1 + max((child.depth for child in self.children), default=0)
        if size > MAX_NODES:
            raise ExpressionError(
                f"an expression of {size} nodes is too large (at most {MAX_NODES})",
                hint="publish parts of it as compositions or merges, and name those",
            )
        if depth > MAX_DEPTH:
            raise ExpressionError(f"an expression nested {depth} levels deep is too deep (at most {MAX_DEPTH})")
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "depth", depth)

    def walk(self) -> Iterator[Expr]:
        """Yield every node, this one first."""
        yield self
        for child in self.children:
            yield from child.walk()

    @property
    def refs(self) -> tuple[str, ...]:
        """Texts of all leaves, each once, in order of appearance."""
        return tuple(dict.fromkeys(node.text for node in self.walk() if isinstance(node, Ref)))

    def __add__(self, other: Expr) -> Expr:
        return add(self, other) if isinstance(other, Expr) else NotImplemented

    def __radd__(self, other: int) -> Expr:  # lets sum(...) start from its 0
        return self if other == 0 else NotImplemented

    def __sub__(self, other: Expr) -> Expr:
        return add(self, -other) if isinstance(other, Expr) else NotImplemented

    def __neg__(self) -> Expr:
        return Scale(-self.factor, self.of) if isinstance(self, Scale) else Scale(-1.0, self)

    def __mul__(self, factor: float) -> Expr:
        return Scale(factor, self) if isinstance(factor, int | float) else NotImplemented

    __rmul__ = __mul__

    def __rshift__(self, other: Expr) -> Expr:
        return seq(self, other) if isinstance(other, Expr) else NotImplemented

    def __str__(self) -> str:
        return _text(self, _SEQ)


@dataclass(frozen=True)
class Ref(Expr):
    """A leaf: the text of an adapter ref (``ns/name@1.2.0``) or the name of an adapter attached to the model."""

    text: str

    def __init__(self, text: str) -> None:
        if not isinstance(text, str) or not text or text != text.strip() or not text.isprintable():
            raise ExpressionError(f"{text!r} does not name an adapter", hint="write ns/name@1.2.0, ns/name or name")
        if len(text) > MAX_NAME:
            raise ExpressionError(f"a ref of {len(text)} characters is too long (at most {MAX_NAME})")
        object.__setattr__(self, "text", text)
        self._measure()


@dataclass(frozen=True)
class Scale(Expr):
    """``factor * of``: the base plus ``factor`` times what ``of`` changes. ``factor`` is finite."""

    factor: float
    of: Expr

    def __init__(self, factor: float, of: Expr) -> None:
        object.__setattr__(self, "factor", _finite(factor) + 0.0)  # + 0.0 makes -0.0 the one zero
        object.__setattr__(self, "of", _expr(of))
        self._measure()

    @property
    def children(self) -> tuple[Expr, ...]:  # noqa: D102
        return (self.of,)


@dataclass(frozen=True)
class Add(Expr):
    """``a + b + ...``: all terms act on the same base. ``Add(())`` is the identity: nothing is applied.

    A sum inside a sum is spliced in, so ``(a + b) + c`` and ``a + (b + c)`` are one tree. A sum of one term is that
    term: :func:`add` returns it, the constructor refuses.
    """

    terms: tuple[Expr, ...]

    def __init__(self, terms: Iterable[Expr]) -> None:
        flat = _splice(terms, Add)
        if len(flat) == 1:
            raise ExpressionError(f"a sum of the one term {flat[0]} is no sum", hint="use the term, or add(*terms)")
        object.__setattr__(self, "terms", flat)
        self._measure()

    @property
    def children(self) -> tuple[Expr, ...]:  # noqa: D102
        return self.terms


@dataclass(frozen=True)
class Seq(Expr):
    """``a >> b >> ...``: each stage acts on the model adapted by those before it. At least two stages."""

    stages: tuple[Expr, ...]

    def __init__(self, stages: Iterable[Expr]) -> None:
        flat = _splice(stages, Seq)
        if len(flat) < 2:
            raise ExpressionError(f"a sequence needs two stages, not {len(flat)}", hint="use seq(*stages)")
        object.__setattr__(self, "stages", flat)
        self._measure()

    @property
    def children(self) -> tuple[Expr, ...]:  # noqa: D102
        return self.stages


@dataclass(frozen=True)
class Call(Expr):
    """``function(args..., option=value)``; options are kept sorted by name, lists as tuples.

    Which functions there are and what options they take: ``compose.function``.
    """

    function: str
    args: tuple[Expr, ...]
    options: tuple[tuple[str, Value], ...]

    def __init__(
        self,
        function: str,
        args: Iterable[Expr],
        options: Mapping[str, object] | Iterable[tuple[str, object]] = (),
    ) -> None:
        if not all(part.isidentifier() and part.isascii() for part in str(function).split(".")):
            raise ExpressionError(f"{function!r} is not the name of a function")
        pairs = sorted(dict(options).items())
        for name, _ in pairs:
            if not (isinstance(name, str) and name.isidentifier() and name.isascii()):
                raise ExpressionError(f"{name!r} is not the name of an option of {function}")
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "args", tuple(_expr(arg) for arg in args))
        object.__setattr__(self, "options", tuple((n, _value(v, f"option {n!r} of {function}")) for n, v in pairs))
        self._measure()

    @property
    def children(self) -> tuple[Expr, ...]:  # noqa: D102
        return self.args


IDENTITY = Add(())


def add(*terms: Expr) -> Expr:
    """Sum of any number of terms: none is the identity, one is itself."""
    flat = _splice(terms, Add)
    return flat[0] if len(flat) == 1 else Add(flat)


def seq(*stages: Expr) -> Expr:
    """Sequence of any number of stages: none is the identity, one is itself."""
    return IDENTITY if not stages else stages[0] if len(stages) == 1 else Seq(stages)


def substitute(expr: Expr, leaf: Callable[[Ref], Expr]) -> Expr:
    """Return the tree with every leaf replaced by ``leaf(ref)``."""
    if isinstance(expr, Ref):
        return leaf(expr)
    if isinstance(expr, Scale):
        return Scale(expr.factor, substitute(expr.of, leaf))
    if isinstance(expr, Call):
        return Call(expr.function, [substitute(arg, leaf) for arg in expr.args], expr.options)
    parts = [substitute(child, leaf) for child in expr.children]
    return seq(*parts) if isinstance(expr, Seq) else add(*parts)


# -- printing ---------------------------------------------------------------------------------------------------

_SEQ, _ADD, _MUL, _ATOM = range(4)  # how tightly the place around a node binds


def _text(expr: Expr, place: int) -> str:
    if isinstance(expr, Ref):
        return quote(expr.text)
    if isinstance(expr, Call):
        parts = [_text(arg, _SEQ) for arg in expr.args] + [f"{n}={_literal(v)}" for n, v in expr.options]
        return f"{expr.function}({', '.join(parts)})"
    if expr == IDENTITY:
        return IDENTITY_WORD
    if isinstance(expr, Scale):
        own, text = _MUL, _product(expr.factor, expr.of)
    elif isinstance(expr, Add):
        own, text = _ADD, _sum(expr.terms)
    else:
        own, text = _SEQ, " >> ".join(_text(stage, _ADD) for stage in expr.children)
    return f"({text})" if own < place else text


def _product(factor: float, of: Expr) -> str:
    inner = _text(of, _ATOM)
    if factor == -1 and not isinstance(of, Scale):  # -(2 * a) reads as -2 * a, another tree
        return "-" + inner
    return f"{_literal(factor)} * {inner}"


def _sum(terms: tuple[Expr, ...]) -> str:
    text = _text(terms[0], _MUL)
    for term in terms[1:]:
        if isinstance(term, Scale) and term.factor < 0:
            plain = term.factor == -1 and not isinstance(term.of, Scale)
            text += " - " + (_text(term.of, _MUL) if plain else _product(-term.factor, term.of))
        else:
            text += " + " + _text(term, _MUL)
    return text


def _literal(value: Value) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    if isinstance(value, str):
        return string(value)
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
