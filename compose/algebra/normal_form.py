"""Normal form: the one tree that stands for all spellings of a composition, and its digest.

Rules, each a law of the algebra:

- nested sums and sequences are flat; the identity is dropped from both;
- ``c * (a + b)`` is ``c * a + c * b``; ``c * (d * a)`` is ``(c d) * a``; ``0 * a`` is the identity;
- equal terms of a sum are one term with the sum of their factors; terms are sorted;
- a function puts its own calls in order (``average`` sorts its arguments).

``c * (a >> b)`` stays: it is the base plus c times what the sequence changes, which is not ``(c * a) >> (c * b)``.
Factors are multiplied and added exactly and rounded once, so their order cannot show in the digest.
"""

from __future__ import annotations

from fractions import Fraction

from compose.algebra.recipe import to_json
from compose.errors import ExpressionError
from compose.expr.tree import Call, Expr, Scale, Seq, add, seq
from compose.function import bind, get_function
from hub.io import canonical_json


def normalize(expr: Expr) -> Expr:
    """Return the normal form; ``normalize(normalize(e)) == normalize(e)``."""
    return _rebuild(_linear(expr))


def digest(expr: Expr) -> str:
    """``sha256:`` over the canonical JSON (RFC 8785) of the normal form: equal for equal compositions."""
    return canonical_json.digest(canonical_json.dumps(to_json(normalize(expr))))


def sort_key(expr: Expr) -> bytes:
    """Total order of trees in normal form."""
    return canonical_json.dumps(to_json(expr))


def _linear(expr: Expr) -> dict[Expr, Fraction]:
    """``expr`` as a weighted sum: {leaf, sequence or call: factor}."""
    if isinstance(expr, Scale):
        factor = Fraction(expr.factor)
        return {term: factor * own for term, own in _linear(expr.of).items()}
    if isinstance(expr, Seq):
        stages = [stage for stage in map(normalize, expr.stages) if stage.children or stage.refs]
        joined = seq(*stages)
        return {joined: Fraction(1)} if isinstance(joined, Seq) else _linear(joined)
    if isinstance(expr, Call):
        return _call(Call(expr.function, map(normalize, expr.args), expr.options))
    if not expr.children and expr.refs:
        return {expr: Fraction(1)}
    total: dict[Expr, Fraction] = {}
    for child in expr.children:
        for term, factor in _linear(child).items():
            total[term] = total.get(term, Fraction(0)) + factor
    return total


def _call(call: Call) -> dict[Expr, Fraction]:
    reduced = get_function(call.function).canonical(call, bind(call))
    return {reduced: Fraction(1)} if isinstance(reduced, Call) else _linear(reduced)


def _rebuild(terms: dict[Expr, Fraction]) -> Expr:
    kept = []
    for term in sorted(terms, key=sort_key):
        try:
            factor = float(terms[term])
        except OverflowError as error:
            raise ExpressionError(f"the factors of {term} multiply to more than a float can hold") from error
        if factor:
            kept.append(term if factor == 1 else Scale(factor, term))
    return add(*kept)
