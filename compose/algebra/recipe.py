"""The JSON (and YAML) form of an expression, one to one with the tree.

=========================  ==============================================================
``ns/name@1.2.0``          ``"ns/name@1.2.0"``
``0.5 * a``                ``{"scale": 0.5, "of": "a"}``
``a + b``                  ``{"add": ["a", "b"]}``; the identity is ``{"add": []}``
``a >> b``                 ``{"seq": ["a", "b"]}``
``average(a, b, w=[1])``   ``{"call": "average", "args": ["a", "b"], "options": {"w": [1]}}``
=========================  ==============================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from compose.errors import ExpressionError
from compose.expr.tree import MAX_DEPTH, MAX_NODES, Add, Call, Expr, Ref, Scale, Seq, Value
from compose.function import bind

Json: TypeAlias = "str | dict[str, Any]"

_SHAPES = ({"scale", "of"}, {"add"}, {"seq"}, {"call", "args"}, {"call", "args", "options"})


def to_json(expr: Expr) -> Json:
    """JSON value of a tree: a string for a leaf, else an object."""
    if isinstance(expr, Ref):
        return expr.text
    if isinstance(expr, Scale):
        return {"scale": expr.factor, "of": to_json(expr.of)}
    if isinstance(expr, Call):
        options = {name: _plain(value) for name, value in expr.options}
        call: dict[str, Any] = {"call": expr.function, "args": [to_json(arg) for arg in expr.args]}
        return {**call, "options": options} if options else call
    return {"seq" if isinstance(expr, Seq) else "add": [to_json(child) for child in expr.children]}


def from_json(value: object) -> Expr:
    """Tree of a JSON or YAML value.

    Raises
    ------
    ExpressionError
        Naming the place, e.g. ``$.add[1].scale``.
    """
    return _read(value, "$", 1)


def _read(value: object, path: str, level: int) -> Expr:
    if level > MAX_DEPTH:
        raise ExpressionError(f"the recipe is nested deeper than {MAX_DEPTH} levels at {path[:80]}")
    if isinstance(value, str):
        return _at(path, lambda: Ref(value))
    if not isinstance(value, Mapping):
        raise ExpressionError(f"recipe at {path}: {type(value).__name__} is neither a ref nor an object")
    if set(value) not in _SHAPES:
        raise ExpressionError(
            f"recipe at {path}: keys {', '.join(map(str, list(value)[:6])) or '(none)'} are no expression",
            hint="use {scale, of}, {add}, {seq} or {call, args, options}",
        )
    if "scale" in value:
        of = _read(value["of"], path + ".of", level + 1)
        return _at(path + ".scale", lambda: Scale(value["scale"], of))
    if "call" in value:
        return _call(value, path, level)
    key = "add" if "add" in value else "seq"
    parts = _list(value[key], f"{path}.{key}", level)
    return _at(f"{path}.{key}", lambda: Add(parts) if key == "add" else Seq(parts))


def _call(value: Mapping[str, Any], path: str, level: int) -> Expr:
    options = value.get("options", {})
    if not isinstance(options, Mapping):
        raise ExpressionError(f"recipe at {path}.options: {type(options).__name__} is not an object")
    args = _list(value["args"], path + ".args", level)

    def make() -> Expr:
        call = Call(value["call"], args, options)
        bind(call)
        return call

    return _at(path + ".call", make)


def _list(value: object, path: str, level: int) -> list[Expr]:
    if not isinstance(value, list | tuple):
        raise ExpressionError(f"recipe at {path}: {type(value).__name__} is not a list")
    if len(value) > MAX_NODES:
        raise ExpressionError(f"recipe at {path}: {len(value)} parts are too many (at most {MAX_NODES})")
    return [_read(item, f"{path}[{index}]", level + 1) for index, item in enumerate(value)]


def _at(path: str, make: Callable[[], Expr]) -> Expr:
    try:
        return make()
    except ExpressionError as error:
        raise ExpressionError(f"recipe at {path}: {error.message}", hint=error.hint) from error


def _plain(value: Value) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
