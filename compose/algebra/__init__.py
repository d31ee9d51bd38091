"""The algebra of expressions: text and JSON to tree and back, normal form, digest, carets under errors."""

from collections.abc import Sequence
from typing import TypeAlias

from compose.algebra.grammar import parse
from compose.algebra.normal_form import digest, normalize
from compose.algebra.recipe import from_json, to_json
from compose.errors import KindError
from compose.expr.tree import IDENTITY, Expr

__all__ = ["ExprLike", "as_expr", "as_rows", "digest", "from_json", "normalize", "parse", "to_json"]

ExprLike: TypeAlias = Expr | str | None


def as_rows(expr: ExprLike | Sequence[ExprLike]) -> list[Expr]:
    """One tree for all rows, or one a row; an empty list is refused."""
    rows = [expr] if expr is None or isinstance(expr, str | Expr) else list(expr)
    if not rows:
        raise KindError("an empty list of rows was given", hint="give one expression per row, or None for the base")
    return [as_expr(row) for row in rows]


def as_expr(value: ExprLike) -> Expr:
    """Read an expression from text, a tree, or None (nothing applied)."""
    if value is None:
        return IDENTITY
    return parse(value) if isinstance(value, str) else value
