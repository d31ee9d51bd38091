"""Merging kinds whose tensors are merged as they are: gains and biases, bottlenecks, prefixes, prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compose.kind.adapter import Adapter, KindConfig
from compose.kind.registry import make_config
from compose.parameter_space.combine import merge_tensors
from compose.parameter_space.job import Job, Member, kind_names
from compose.parameter_space.method import Factored, Linear

if TYPE_CHECKING:
    from compose.parameter_space.method import Join


def merge(job: Job) -> Adapter:
    """A new adapter of the members' kind: theta = theta_0 + merged tau, tau = theta - theta_0.

    Where the effect is linear in the tensors (``averages_in_weight``: ia3, bias), theta_0 is what changes nothing, so
    members may act at different sites and be weighted sums. Elsewhere (bottleneck, prefix, prompt) theta_0 = 0, the
    members must be single adapters, and their tensors must correspond: one config.

    Raises
    ------
    KindError
        Names the merge and the adapters that do not correspond.
    """
    first = job.adapters[0]
    if kind_names(job.adapters) != {first.kind}:
        raise job.refuse(
            f"{job.kinds} have no parameters in common",
            "merge adapters of one kind; a + b applies both, ensemble.mean(a, b) mixes their outputs",
        )
    on_layers = isinstance(job.method, Factored) or job.method.needs is not None
    if on_layers or job.rank is not None:
        what = f"{job.method.name} works on" if on_layers else "a rank is for"
        raise job.refuse(f"{what} low-rank deltas, and {job.kinds} has none", "lora and dora have them")
    if not first.averages_in_weight:
        return _same_tensors(job, first)
    config = union_config(job)
    origin = _fresh(job, first, config)
    theta_0 = origin.state()
    members = [task_vector(m, theta_0, job) for m in job.members]
    tau = merge_tensors(job.method, job.options, members, theta_0)
    return fill(origin, {key: value.float() + tau[key].to(value.device) for key, value in theta_0.items()})


def _same_tensors(job: Job, first: Adapter) -> Adapter:
    if isinstance(job.method, Linear) and job.method.join is not None:
        return _side_by_side(job, job.method.join, first)
    for member in job.members:
        if not member.single:
            raise job.refuse(
                f"{member.expr} is no single adapter, and the effect of kind {first.kind!r} is no linear function of "
                "its tensors, so a factor or a sum has no tensors of its own",
                "merge the adapters themselves",
            )
    for other in job.adapters[1:]:
        if other.config != first.config:
            raise job.refuse(
                f"{first.kind} {first.name!r} and {other.name!r} have different configs, so their tensors do not "
                "correspond",
                "use adapters of one config, cat(a, b), or ensemble.mean(a, b)",
            )
    own = [m.adapters[0].state(heads=False) for m in job.members]
    theta = merge_tensors(job.method, job.options, own, own[0])
    fresh = _fresh(job, first, first.config)
    return fill(fresh, {**theta, **merge_heads(job, fresh.head_state())})


def _side_by_side(job: Job, join: Join, first: Adapter) -> Adapter:
    for member in job.members:
        if member.sequential:
            raise job.refuse(f"{member.expr} applies one adapter after the other; only sums can be laid side by side")
    weights = job.method.coefficients(job.options, len(job.members))  # type: ignore[union-attr]
    terms = [(w * c, a) for w, m in zip(weights, job.members, strict=True) for c, a in m.terms if w * c != 0]
    config, tensors = join(terms or [(0.0, first)])
    fresh = _fresh(job, first, config)
    for (path, name), value in tensors.items():
        fresh.at(path, name).data = value.contiguous()
    return fill(fresh, {**fresh.state(heads=False), **merge_heads(job, fresh.head_state())})


def merge_heads(job: Job, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole modules carried by the members, merged relative to the base's own, ``base``."""
    if not base:
        return {}
    members = [task_vector(m, base, job) for m in job.members]
    tau = merge_tensors(job.method, job.options, members, base)
    return {key: value.float() + tau[key].to(value.device) for key, value in base.items()}


def task_vector(member: Member, origin: Mapping[str, Tensor], job: Job) -> dict[str, Tensor]:
    """`tau = sum_t c_t (theta_t - theta_0)` of a member, by key; keys it does not have are left out."""
    holders = [a for a in member.adapters if a.state().keys() & origin.keys()]
    if member.sequential and len(holders) > 1:
        names = ", ".join(repr(a.name) for a in holders)
        raise job.refuse(f"{member.expr} puts the tensors of {names} one after the other; they can only be added")
    total: dict[str, Tensor] = {}
    for c, adapter in member.terms:
        for key, value in adapter.state().items():
            if key not in origin:
                continue
            if value.shape != origin[key].shape:
                got, wanted = tuple(value.shape), tuple(origin[key].shape)
                raise job.refuse(f"{key} of {adapter.name!r} has shape {got}, and {wanted} is needed")
            tau = c * (value.float() - origin[key].to(value.device).float())
            total[key] = total[key] + tau if key in total else tau
    return total


def union_config(job: Job) -> KindConfig:
    """The config whose adapter has every tensor of every member: the same, or one that names all their paths."""
    first = job.adapters[0]
    configs = {a.config for a in job.adapters}
    if len(configs) == 1:
        return first.config
    places: dict[str, Any] = {
        "target_modules": tuple(dict.fromkeys(p for a in job.adapters for p in a.paths)),
        "modules_to_save": saved_modules(job),
        "layers": None,
    }
    if "feedforward_modules" in type(first.config).model_fields:
        marked = [p for a in job.adapters for p in a.peft_feedforward()]  # type: ignore[operator]
        places["feedforward_modules"] = tuple(dict.fromkeys(marked))
    if len({a.config.model_copy(update=places) for a in job.adapters}) > 1:
        raise job.refuse(f"the configs of {job.kinds} differ in more than where they act")
    return make_config(type(first), first.config.model_copy(update=places).model_dump())


def saved_modules(job: Job) -> tuple[str, ...]:
    """Names of the whole modules that any member carries."""
    return tuple(dict.fromkeys(n for a in job.adapters for n in a.config.modules_to_save))


def _fresh(job: Job, like: Adapter, config: KindConfig) -> Adapter:
    return type(like)(config, job.home.sites, job.home.model, name=job.name).to(job.home.model.device)


def fill(adapter: Adapter, state: Mapping[str, Tensor]) -> Adapter:
    """Put ``state`` into a fresh adapter, in the dtype its tensors have there, and freeze it."""
    own = adapter.state()
    with torch.no_grad():
        adapter.load_state({key: value.to(own[key].dtype) if key in own else value for key, value in state.items()})
    return adapter.freeze()
