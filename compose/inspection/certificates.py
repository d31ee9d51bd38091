"""What merges with a limited rank will leave out, measured before a base is loaded.

Merges of changes of weights (LoRA, LoHa, deltas, ...) need no weight of the base: they are carried out on the adapters'
own numbers, beside a base without any. What reads the base's weights, as the norms of DoRA, is known once it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch._subclasses.fake_tensor import FakeTensor

from compose.base.sites import Site
from compose.expr.tree import Call, Expr
from compose.formats.directory import read_adapter
from compose.function import bind, get_function
from compose.inspection.fake_base import FakeBase
from compose.kind.adapter import Adapter
from compose.parameter_space.certificate import Certificate
from compose.parameter_space.execute import Workspace, carry_out
from compose.parameter_space.method import need_data
from compose.planning.members import AdapterFinder
from compose.runtime.row_trials import FAILURES

__all__ = ["MOST", "certificates"]

MOST = 2**30  # bytes of the float32 matrices of one merge; a larger one is measured when it is made


def certificates(expr: Expr, outline: FakeBase, finder: AdapterFinder) -> dict[str, Certificate | None]:
    """Certificates of the merges in ``expr`` that make a new adapter, by their text.

    None stands for a merge of which only loading tells: on data, of what reads the base's weights, or too large.
    """
    found: dict[str, Certificate | None] = {}
    for call in _outermost(expr, outline):
        found |= _of(call, outline, finder)
    return found


def _outermost(expr: Expr, outline: FakeBase) -> Iterator[Call]:
    if isinstance(expr, Call) and get_function(expr.function).family == "merge" and outline.makes_adapter(expr):
        yield expr
        return
    for child in expr.children:
        yield from _outermost(child, outline)


def _of(call: Call, outline: FakeBase, finder: AdapterFinder) -> Mapping[str, Certificate | None]:
    limited = [node for node in call.walk() if isinstance(node, Call) and getattr(bind(node), "rank", None) is not None]
    members = [outline.runtime.adapters[name] for name in call.refs]
    size = sum(4 * site.in_features * site.out_features for site in _sites(members, outline))
    if need_data(call) or size > MOST:
        return {str(call): None}
    if not limited:
        return {str(call): Certificate()}  # what is not cut loses nothing
    home = Workspace(outline.runtime)
    try:
        with torch.no_grad():
            for name in call.refs:
                home.adapters[name] = _numbers(name, outline, finder)
            made = carry_out(home, call, str(call), None)
            found = {**made.inner, str(call): made.certificate}
            # What a fake weight had a part in has no value: reading it here fails as below.
            return {text: one for text, one in found.items() if one.share >= 0}
    except FAILURES:
        return {str(call): None}


def _sites(members: list[Adapter], outline: FakeBase) -> Iterator[Site]:
    paths = dict.fromkeys(path for adapter in members for path in adapter.module_paths)
    return (outline.sites[path] for path in paths if path in outline.sites.paths)


def _numbers(name: str, outline: FakeBase, finder: AdapterFinder) -> Adapter:
    adapter = read_adapter(finder.find(name).where, outline.sites, outline.model, name=name)
    if any(isinstance(p.data, FakeTensor) for p in adapter.parameters()):
        raise ValueError(f"{name} holds weights of the base")
    return adapter
