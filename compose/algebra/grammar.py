"""Expression text to tree, through Python's own parser and a whitelist; nothing is ever evaluated.

Refs and numbers are not Python (``ns/name@1.2.0``), so every word is first replaced by a placeholder name; Python's
``ast`` then settles precedence (``*`` before ``+`` before ``>>``) and brackets, and the few node types below are turned
into :mod:`compose.expr.tree` trees. Any other node is refused at its place in the text.
"""

from __future__ import annotations

import ast
import bisect
from collections.abc import Callable

from compose.errors import CallError, ExpressionError
from compose.expr.tokens import IDENTITY_WORD, Token, error_at, tokens
from compose.expr.tree import IDENTITY, MAX_DEPTH, MAX_NODES, Call, Expr, Ref, Scale, Value, add, seq
from compose.function import bind

_WORDS: dict[str, Value] = {"true": True, "false": False, "none": None}
_NUMBERS = "multiply an adapter by it: 0.5 * ns/name"
_MAX_TOKENS = 8 * MAX_NODES


def parse(text: str) -> Expr:
    """Read an expression.

    Raises
    ------
    ExpressionError
        The message shows the text with carets under the place that is wrong.
    """
    if not isinstance(text, str):
        raise ExpressionError(f"an expression is text, not {type(text).__name__}")
    reader = _Reader(text)
    tree = reader.tree()
    expr = reader.term(tree, 1)
    if not isinstance(expr, Expr):
        raise reader.wrong(tree, "a number is no composition", _NUMBERS)
    return expr


def subexpressions(text: str) -> list[tuple[Expr, int, int]]:
    """Every sub-expression of a text that can be read, inner ones first: (tree, start, end) with text[start:end]."""
    reader = _Reader(text)
    reader.term(reader.tree(), 1)
    return reader.places


class _Reader:
    """One text, its tokens, and where each lies in the Python source made from them."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[Token] = []
        self.columns: list[int] = []
        self.places: list[tuple[Expr, int, int]] = []
        self.source = self._placeholders()

    def _placeholders(self) -> str:
        parts: list[str] = []
        column = level = minuses = 0
        for index, token in enumerate(tokens(self.text)):
            level += {"(": 1, "[": 1, ")": -1, "]": -1}.get(token.text, 0) if token.kind == "sign" else 0
            minuses = minuses + 1 if token.text == "-" and token.kind == "sign" else 0
            if level > MAX_DEPTH or minuses > MAX_DEPTH:  # before Python's parser has to care
                raise error_at(self.text, token.start, token.end, f"nested deeper than {MAX_DEPTH} levels")
            if index >= _MAX_TOKENS:
                raise ExpressionError(
                    f"an expression of more than {_MAX_TOKENS} words is too large",
                    hint="publish parts of it and compose those: hub compose PART -o NS/NAME@VERSION",
                )
            part = token.text if token.kind == "sign" else f"_{index}"
            self.tokens.append(token)
            self.columns.append(column)
            parts.append(part)
            column += len(part) + 1
        if not parts:
            raise ExpressionError("an empty text is no expression", hint=f"{IDENTITY_WORD!r} applies nothing")
        return " ".join(parts)

    def tree(self) -> ast.expr:
        try:
            return ast.parse(self.source, mode="eval").body
        except SyntaxError as error:
            column = error.offset or len(self.source) + 1  # Python says 0 where the text ends too early
            token, at_end = self._token(column - 1), column > len(self.source)
            start, end = (len(self.text.rstrip()),) * 2 if at_end else (token.start, token.end)
            what = "something is missing here" if at_end else f"{token.text!r} does not fit here"
            raise error_at(self.text, start, end, what, hint=self._syntax_hint(error)) from error
        except (RecursionError, MemoryError) as error:
            raise ExpressionError("the expression is nested too deeply to be read") from error

    def _syntax_hint(self, error: SyntaxError) -> str | None:
        if "never closed" in error.msg or "unmatched" in error.msg:
            return "count the brackets"
        return "join adapters by +, - or >>, with spaces around a minus"

    def _token(self, column: int) -> Token:
        return self.tokens[max(0, bisect.bisect_right(self.columns, column) - 1)]

    def wrong(self, node: ast.AST, message: str, hint: str | None = None) -> ExpressionError:
        """Return an error that points at ``node``."""
        return error_at(self.text, *self._span(node), message, hint=hint)

    def _span(self, node: ast.AST) -> tuple[int, int]:
        first = self._token(getattr(node, "col_offset", 0))
        last = self._token(max(0, (getattr(node, "end_col_offset", 0) or 1) - 1))
        return first.start, max(first.end, last.end)

    # -- nodes -------------------------------------------------------------------------------------------------------

    def term(self, node: ast.expr, level: int) -> Expr | float:
        """Tree of ``node``, or the number it stands for; trees are noted with their places."""
        value = self._term(node, level)
        if isinstance(value, Expr):
            self.places.append((value, *self._span(node)))
        return value

    def _term(self, node: ast.expr, level: int) -> Expr | float:
        if level > MAX_DEPTH:
            raise self.wrong(node, f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub | ast.RShift):
            return self._chain(node, level)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            return self._product(node, level)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            value = self.term(node.operand, level + 1)
            return -value if isinstance(node.op, ast.USub) else value
        if isinstance(node, ast.Call):
            return self._call(node, level)
        if isinstance(node, ast.Name):
            return self._leaf(node)
        if isinstance(node, ast.List | ast.Tuple):
            raise self.wrong(node, "a list stands only as the value of an option", "join adapters by + or >>")
        raise self.wrong(node, "this is not part of an expression")

    def _chain(self, node: ast.BinOp, level: int) -> Expr:
        # Python nests a + b + c to the left; unrolled here, a long sum costs no recursion.
        sums = not isinstance(node.op, ast.RShift)
        kinds = (ast.Add, ast.Sub) if sums else (ast.RShift,)
        parts: list[tuple[bool, ast.expr]] = []
        left: ast.expr = node
        while isinstance(left, ast.BinOp) and isinstance(left.op, kinds):
            parts.append((isinstance(left.op, ast.Sub), left.right))
            left = left.left
        parts.append((False, left))
        trees: list[Expr] = []
        for negative, part in reversed(parts):
            tree = self.term(part, level + 1)
            if not isinstance(tree, Expr):
                raise self.wrong(part, "a number cannot be added or sequenced", _NUMBERS)
            trees.append(-tree if negative else tree)
        return self._checked(node, lambda: add(*trees) if sums else seq(*trees))

    def _product(self, node: ast.BinOp, level: int) -> Expr | float:
        factors: list[ast.expr] = []
        left: ast.expr = node
        while isinstance(left, ast.BinOp) and isinstance(left.op, ast.Mult):
            factors.append(left.right)
            left = left.left
        result = self.term(left, level + 1)
        for factor in reversed(factors):
            value = self.term(factor, level + 1)
            if isinstance(value, Expr) and isinstance(result, Expr):
                if {"nan", "inf", "infinity"} & {name.lower() for name in (*value.refs, *result.refs)}:
                    raise self.wrong(node, "a weight is a finite number")
                raise self.wrong(
                    factor,
                    "an adapter is multiplied by a number, not by an adapter",
                    "a >> b applies b after a; put spaces around a minus",
                )
            try:
                result = _times(result, value)
            except ExpressionError as error:
                raise self.wrong(factor, error.message, error.hint) from error
        return result

    def _call(self, node: ast.Call, level: int) -> Expr:
        if not isinstance(node.func, ast.Name) or (name := self._token(node.func.col_offset)).kind != "ref":
            raise self.wrong(node.func, "only a named function can be called", "such as average(a, b)")
        args: list[Expr] = []
        for arg in node.args:
            value = self.term(arg, level + 1)
            if not isinstance(value, Expr):
                message = f"the arguments of {name.text} are adapters, not numbers"
                raise self.wrong(arg, message, "a number is given by name: option=0.5")
            args.append(value)
        options: dict[str, Value] = {}
        places: dict[str, ast.AST] = {}
        for keyword in node.keywords:
            option = self._token(keyword.col_offset).text
            if option in options:
                raise self.wrong(keyword, f"option {option!r} of {name.text} is given twice")
            options[option], places[option] = self._value(keyword.value, level), keyword
        try:
            call = Call(name.text, args, options)
            bind(call)
        except CallError as error:
            raise self.wrong(places.get(error.option, node.func), error.message, error.hint) from error
        except ExpressionError as error:
            raise self.wrong(node.func, error.message, error.hint) from error
        return call

    def _leaf(self, node: ast.Name) -> Expr | float:
        token = self._token(node.col_offset)
        if token.kind == "number":
            return self._number(token, node)
        if token.kind == "ref" and token.text == IDENTITY_WORD:
            return IDENTITY
        return self._checked(node, lambda: Ref(token.text))

    def _number(self, token: Token, node: ast.AST) -> float:
        value = float(token.text)
        if value == float("inf"):
            raise self.wrong(node, "this number is too large to be a weight")
        return value

    def _value(self, node: ast.expr, level: int) -> Value:
        if level > MAX_DEPTH:
            raise self.wrong(node, f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(node, ast.List):
            return tuple(self._value(item, level + 1) for item in node.elts)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = self._value(node.operand, level + 1)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return -value
        if isinstance(node, ast.Name):
            token = self._token(node.col_offset)
            if token.kind == "number":
                number = self._number(token, node)
                return int(token.text) if token.text.isdigit() and number < 2**53 else number
            return _WORDS.get(token.text.lower(), token.text) if token.kind == "ref" else token.text
        raise self.wrong(node, "an option takes a number, a word, a quoted string, true, false, none or a list of them")

    def _checked(self, node: ast.AST, make: Callable[[], Expr]) -> Expr:
        try:
            return make()
        except ExpressionError as error:
            raise self.wrong(node, error.message, error.hint) from error


def _times(a: Expr | float, b: Expr | float) -> Expr | float:
    if isinstance(a, Expr):
        return Scale(b, a)  # type: ignore[arg-type]
    return Scale(a, b) if isinstance(b, Expr) else a * b
