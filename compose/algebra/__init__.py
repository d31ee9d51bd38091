"""The algebra of expressions: text and JSON to tree and back, normal form, digest, carets under errors."""

from collections.abc import Sequence
from typing import TypeAlias

from compose.algebra.grammar import parse
from compose.algebra.normal_form import digest, normalize
from compose.algebra.recipe import from_json, to_json
from compose.errors import ExpressionError, KindError
from compose.expr.tree import IDENTITY, Expr

__all__ = ["ExprLike", "as_expr", "as_rows", "digest", "from_json", "normalize", "parse", "to_json"]

ExprLike: TypeAlias = Expr | str | None


def as_rows(expr: ExprLike | Sequence[ExprLike]) -> list[Expr]:
    """One tree for all rows, or one a row; an empty list is refused."""
    rows = list(expr) if isinstance(expr, Sequence) and not isinstance(expr, str) else [expr]
    if not rows:
        raise KindError("an empty list of rows was given", hint="give one expression per row, or None for the base")
    return [as_expr(row) for row in rows]


def as_expr(value: ExprLike) -> Expr:
    """Read an expression from text, a tree, or None (nothing applied)."""
    if value is None:
        return IDENTITY
    if not isinstance(value, str | Expr):
        raise ExpressionError(
            f"an expression is text, and this is a {type(value).__name__}",
            hint='"0.5 * a + b", a list with one for each row, or None for the bare base',
        )
    return parse(value) if isinstance(value, str) else value
