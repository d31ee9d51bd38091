"""``at(a, layers=[...], sites=[...])``: an adapter, or an expression, where it says; the base elsewhere.

At a module in layer l with role or path s the result is a where l is in ``layers`` and s is named by ``sites``, and the
identity otherwise. ``layers`` says nothing of modules outside the blocks; whole modules (a head) always come along.
"""

from __future__ import annotations

from pydantic import Field

from compose.errors import CallError
from compose.expr.tree import Add, Call, Expr, Scale, Seq, add, seq
from compose.function import FunctionSpec, Options, register


class AtOptions(Options):
    """Options of ``at``."""

    layers: tuple[int, ...] | None = Field(None, description="numbers of layers, from 0")
    sites: tuple[str, ...] | None = Field(
        None, description='roles ("attn.q"), or parts of paths ("q_proj", "language_model")'
    )


def _check(call: Call, options: AtOptions) -> None:  # noqa: ARG001
    for name, given in (("layers", options.layers), ("sites", options.sites)):
        if given is not None and not given:
            raise CallError(
                f"{name} is empty, so nothing would act anywhere", option=name, hint="leave the adapter out"
            )
    if options.layers is not None and min(options.layers) < 0:
        raise CallError(f"there is no layer {min(options.layers)}", option="layers", hint="layers are numbered from 0")


def _canonical(call: Call, options: AtOptions) -> Expr:
    # It distributes over all that acts site by site, so it stands at the leaves.
    where: dict[str, list[int] | list[str]] = {}
    if options.layers is not None:
        where["layers"] = sorted(set(options.layers))
    if options.sites is not None:
        where["sites"] = sorted(set(options.sites))

    def inside(expr: Expr) -> Expr:
        if isinstance(expr, Scale):
            return Scale(expr.factor, inside(expr.of))
        if isinstance(expr, Add):
            return add(*map(inside, expr.terms))
        if isinstance(expr, Seq):
            return seq(*map(inside, expr.stages))
        return Call(call.function, [expr], where) if where else expr

    return inside(call.args[0])


AT = register(
    FunctionSpec(
        "at",
        "select",
        "The adapter at the named layers and sites, the base elsewhere.",
        AtOptions,
        maximum=1,
        check=_check,
        canonical=_canonical,
    )
)
