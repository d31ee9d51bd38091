"""An explanation as text for people, and a plan as a graph for Graphviz."""

from __future__ import annotations

import json
from collections.abc import Iterator

from compose.inspection.explain import Explanation
from compose.parameter_space.certificate import Certificate
from compose.planning.plan import Plan, Step
from hub.console.output import bytes_text, columns

_SHAPES = {"load": "box", "inject": "doubleoctagon", "merge": "hexagon", "route": "diamond", "ensemble": "diamond"}
_PAIRS = 12  # pairs of members at the same sites that are listed


def as_text(explanation: Explanation) -> str:
    """Sections: what it is, its members, the plan, where members meet, memory, cost."""
    return "\n\n".join(_sections(explanation))


def _sections(explanation: Explanation) -> Iterator[str]:
    base = explanation.base
    held = "" if base.quantize == "none" else f", held as {base.quantize}"
    yield "\n".join(
        [
            explanation.text,
            f"{'normal form:':<14}{explanation.plan.expression}",
            f"{'digest:':<14}{explanation.plan.digest}",
            f"{'base:':<14}{base.name} ({base.weights_fingerprint[7:19]}), {base.parameters:,} parameters{held}",
            *(f"{'warning:':<14}{warning}" for warning in explanation.warnings),
        ]
    )
    if explanation.members:
        yield _members(explanation)
    if explanation.requires:
        rows = [(need.name, need.range or "", need.digest or "") for need in explanation.requires]
        yield columns(("REQUIRES", "RANGE", "DIGEST"), rows)
    steps = [
        (str(s.index), s.operation, _node(s), s.kind or "", _numbers(s.inputs), _numbers(s.frees), where)
        for s, where in zip(explanation.plan.steps, explanation.where, strict=True)
    ]
    yield columns(("STEP", "DOES", "WHAT", "KIND", "READS", "FREES", "WHERE"), steps)
    if explanation.certificates:
        lost = [(text, _lost(one)) for text, one in explanation.certificates.items()]
        yield columns(("MERGE", "LEAVES OUT"), lost)
    yield _conflicts(explanation)
    yield _costs(explanation)


def _lost(certificate: Certificate | None) -> str:
    if certificate is None:
        return "told when it is made: it needs the base's weights, data, or much memory"
    return "nothing: it is exact" if certificate.exact else str(certificate).replace(" left out", "")


def _members(explanation: Explanation) -> str:
    rows = [
        (
            m.ref if "@sha256:" in m.text else m.text,
            m.kind if m.type == "adapter" else f"{m.kind} ({m.type})",
            str(m.sites),
            f"{m.parameters:,}",
            bytes_text(m.bytes),
            m.rung or "not said",
            _share(m.flops, explanation.base.flops),
        )
        for m in explanation.members
    ]
    return columns(("ADAPTER", "KIND", "SITES", "PARAMETERS", "SIZE", "ITS BASE", "COST"), rows)


def _conflicts(explanation: Explanation) -> str:
    if not explanation.shared:
        return "conflicts: none; no two adapters act at one site"
    shown = [f"  {a} and {b} both act at {count} sites" for (a, b), count in explanation.shared.items()][:_PAIRS]
    more = [f"  and {len(explanation.shared) - _PAIRS} more pairs"] if len(explanation.shared) > _PAIRS else []
    return "\n".join(["conflicts: none is refused; `hub compose map` shows how these interfere", *shown, *more])


def _costs(explanation: Explanation) -> str:
    base, adapters = explanation.base.bytes, explanation.adapter_bytes
    memory = f"base {bytes_text(base)} + adapters {bytes_text(adapters)} = {bytes_text(base + adapters)}"
    flops = "not counted: this model's forward looks at values, so it does not run on shapes"
    if explanation.flops is not None and explanation.base.flops is not None:
        flops = f"{_flops(explanation.flops)} a token on top of the base's {_flops(explanation.base.flops)}: "
        flops += _share(explanation.flops, explanation.base.flops)
    peak = f"without activations and cache; the plan holds {explanation.plan.peak} results at once"
    return f"memory: {memory}, {peak}\ncost: {flops}"


def _share(flops: float | None, base: float | None) -> str:
    return "-" if flops is None or not base else f"{100 * flops / base:+.2f}%"


def _flops(count: float) -> str:
    for unit in ("", "K", "M", "G"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}FLOP"
        count /= 1000
    return f"{count:.3g} TFLOP"


def _node(step: Step) -> str:
    return "" if step.operation == "inject" else str(step.expr)


def _numbers(indices: tuple[int, ...]) -> str:
    return ", ".join(map(str, indices))


def as_dot(plan: Plan) -> str:
    """The plan as a Graphviz digraph: one node a step, edges from what is read."""
    lines = ["digraph composition {", "  rankdir=BT;", '  node [fontname="monospace"];']
    for step in plan.steps:
        label = step.operation if step.operation == "inject" else f"{step.operation}\n{step.expr}"
        label += f"\n[{step.kind}]" if step.kind else ""
        shape = _SHAPES.get(step.operation, "ellipse")
        lines.append(f"  {step.index} [shape={shape}, label={json.dumps(label, ensure_ascii=False)}];")
        lines += [f"  {i} -> {step.index};" for i in step.inputs]
    return "\n".join([*lines, "}"])
