"""Where in the text of an expression an error belongs: the smallest part that fails by itself gets the carets."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from compose.algebra.grammar import subexpressions
from compose.errors import ExpressionError
from compose.expr.tokens import error_at
from compose.expr.tree import Expr, Ref
from hub.errors import HubError, RefError
from hub.ref import AdapterRef

_TRIES = 200  # parts tried one by one; of a larger expression the whole is shown

Place = tuple[Expr, int, int]


def point(text: str, error: HubError, attempt: Callable[[Expr], object]) -> HubError:
    """Add the place to the message of an error that ``attempt`` raised for the whole of ``text``.

    Parameters
    ----------
    text
        An expression that can be read.
    error
        What was raised.
    attempt
        Does again, for a part, what has failed for the whole.

    Returns
    -------
    The same error; its message now ends with the text and carets under the leaf it names or the smallest part that
    fails alone.
    """
    if isinstance(error, ExpressionError) and "\n" in error.message:
        return error  # read from text: it shows the place already
    parts = subexpressions(text)
    culprit = next((place for place in parts[:_TRIES] if _fails(attempt, place[0])), parts[-1])
    _, start, end = _named(error.ref, parts, culprit) or culprit
    error.message = error_at(text, start, end, error.message).message
    return error


def _fails(attempt: Callable[[Expr], object], part: Expr) -> bool:
    try:
        attempt(part)
    except HubError:
        return True
    return False


def _named(ref: str | None, parts: Iterable[Place], within: Place) -> Place | None:
    """The leaf inside ``within`` that an error names."""
    for tree, start, end in parts:
        inside = within[1] <= start and end <= within[2]
        if inside and isinstance(tree, Ref) and ref is not None and ref in (tree.text, _canonical(tree.text)):
            return tree, start, end
    return None


def _canonical(text: str) -> str:
    try:
        return str(AdapterRef.parse(text))
    except RefError:
        return text  # the name of an adapter given on the command line
