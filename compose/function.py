"""The functions of the algebra: their names, families, options, and what the planner must know of them.

A function is one file under ``compose/functions/`` (or any package's ``hub.functions`` entry point)::

    class AtOptions(Options):
        layers: tuple[int, ...] | None = Field(None, description="...")

    register(FunctionSpec("at", "select", "The adapter at the named layers.", AtOptions, maximum=1))

A merge is a function that says as well how it is carried out: a file under ``compose/merges/`` (or an entry point
``hub.merges``), see ``compose.parameter_space.method``. The parser, the planner, the JSON form and the documentation
follow from the registration. All these files are imported to read text, so they import torch only inside functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError

from compose.errors import CallError
from compose.expr.tree import Call, Expr
from hub.errors import suggest
from hub.plugins import Registry

Family: TypeAlias = Literal["merge", "route", "ensemble", "select"]


class Options(BaseModel):
    """Base of every function's options: frozen, unknown names refused, no conversion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _nothing_to_check(call: Call, options: Any) -> None:  # noqa: ARG001
    return None


def _as_it_is(call: Call, options: Any) -> Expr:  # noqa: ARG001
    return call


@dataclass(frozen=True)
class FunctionSpec:
    """What is known of a function before any tensor is read.

    Parameters
    ----------
    name
        As written in expressions, dotted for families: ``average``, ``ensemble.demix``.
    family
        ``merge`` folds adapters into a new one in parameter space; ``route`` weighs them per row or token;
        ``ensemble`` mixes output probabilities, so it stands outermost; ``select`` picks.
    summary
        One sentence for the documentation.
    options
        The options, their types, defaults and descriptions.
    minimum, maximum
        How many adapters it takes; no maximum is None.
    check
        Raises :class:`CallError` for options that do not fit the arguments.
    canonical
        Returns the one form of equal calls (arguments sorted, defaults dropped), for the digest. Its arguments are in
        normal form already, and applying it twice changes nothing.
    """

    name: str
    family: Family
    summary: str
    options: type[Options] = Options
    minimum: int = 1
    maximum: int | None = None
    check: Callable[[Call, Any], None] = _nothing_to_check
    canonical: Callable[[Call, Any], Expr] = _as_it_is


FUNCTIONS = Registry[FunctionSpec]("function", package="compose.functions", group="hub.functions", error=CallError)
MERGES = Registry[FunctionSpec]("merge", package="compose.merges", group="hub.merges", error=CallError)


def register(spec: FunctionSpec) -> FunctionSpec:
    """Make a function known. Registering another one under the same name is refused."""
    return FUNCTIONS.add(spec.name, spec)


def functions() -> Mapping[str, FunctionSpec]:
    """All functions by name, merges among them."""
    MERGES.all()  # their files add them to both
    return FUNCTIONS.all()


def get_function(name: str) -> FunctionSpec:
    """Return the function called ``name``; CallError with a suggestion, or with what broke its plugin, otherwise."""
    if name not in functions() and any(plugin.point.name == name for plugin in MERGES.broken()):
        return MERGES.get(name)
    return FUNCTIONS.get(name)


def _amount(spec: FunctionSpec) -> str:
    low, high = spec.minimum, spec.maximum
    number = f"at least {low}" if high is None else str(low) if low == high else f"{low} to {high}"
    return f"{number} adapter{'' if number.split()[-1] == '1' else 's'}"


def bind(call: Call) -> Options:
    """Check a call against its function and return its options with defaults filled in.

    Raises
    ------
    CallError
        Unknown function or option (with a suggestion), too few or too many adapters, or an option of another type.
    """
    spec = get_function(call.function)
    count = len(call.args)
    if count < spec.minimum or (spec.maximum is not None and count > spec.maximum):
        raise CallError(f"{spec.name} takes {_amount(spec)}, not {count}")
    known = {field.alias or name: field for name, field in spec.options.model_fields.items()}  # lambda has an alias
    for name, _ in call.options:
        if name not in known:
            guess = suggest(name, known)
            raise CallError(
                f"{spec.name} has no option {name!r}" + (f"; {guess}" if guess else ""),
                option=name,
                hint="options: " + (", ".join(known) or "none"),
            )
    try:
        options = spec.options(**dict(call.options))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        where = f"option {name!r} of {spec.name}" if name else spec.name
        message = first["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
        raise CallError(f"{where}: {message[:1].lower()}{message[1:]}", option=name) from error
    spec.check(call, options)
    return options
