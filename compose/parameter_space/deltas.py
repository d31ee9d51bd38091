"""Merging changes of weights, site by site: in factors where the method allows, else on one dense layer at a time.

The result is a LoRA, or a DoRA where a gain on W takes part (a sum of DoRAs is a DoRA: gains add, factors stack). What
has a higher rank than its members (TIES, DARE, ...) stays whole, as a dense delta, unless a rank is asked for or the
matrices do not fit ``DENSE_BUDGET``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compose.base.sites import linear_shape
from compose.base.weights import row_norm_squared
from compose.kernels import factors
from compose.kernels.low_rank import Pair
from compose.kind.adapter import Adapter
from compose.kind.registry import get_kind, make_config
from compose.parameter_space.certificate import Certificate, SiteLoss
from compose.parameter_space.combine import at_place, trimmed
from compose.parameter_space.effect import Effect, effect_of
from compose.parameter_space.job import Job
from compose.parameter_space.method import Elementwise, Factored, Linear
from compose.parameter_space.tensors import merge_heads, saved_modules

DENSE_BUDGET = 2**32  # bytes of float32 matrices that one merge may take; without a rank, a larger one is cut


@dataclass(frozen=True)
class SiteResult:
    """The merged effect at one site, as factors (or whole, as a matrix), and what writing it so has lost."""

    pair: Pair
    gain: Tensor | None
    loss: SiteLoss
    matrix: Tensor | None = None


@torch.no_grad()
def merge(job: Job) -> tuple[Adapter, Certificate]:
    """Merge the members' effects on weights into a new adapter.

    Raises
    ------
    KindError
        Names the merge, the adapter and the site: an effect that is no change of a weight, or a bias that moves (which
        no LoRA holds).
    """
    return _finish(job, dict(zip(job.paths, _results(job, job.paths), strict=True)))


@torch.no_grad()
def merge_to_lora(job: Job) -> tuple[Adapter, Certificate]:
    """As :func:`merge` of one member, and always a plain LoRA: a gain on W is written in the factors too."""
    results = {}
    for path in job.steps(job.paths, "lower"):
        effects = effects_at(job, path)
        if effects[0].factored:
            results[path] = shrink(effects[0], effects[0].pair_or_zero(), None, job.rank)
        elif not job.rank:
            raise job.refuse(
                f"the change of {path} by {job.kinds} has full rank", "say which rank to write it in: rank=16"
            )
        else:
            results[path] = from_dense(effects[0].dense(), None, job.rank)
    return _finish(job, results)


def _finish(job: Job, results: dict[str, SiteResult]) -> tuple[Adapter, Certificate]:
    return build(job, results), Certificate({path: m.loss for path, m in results.items()})


def _results(job: Job, paths: Sequence[str]) -> list[SiteResult]:
    if isinstance(job.method, Elementwise):
        whole = fits(job)
        return [_written(job, effects, dense, whole) for _, effects, dense in _elementwise(job, job.method, paths)]
    return [_at_site(job, path) for path in job.steps(paths, "merge")]


def _at_site(job: Job, path: str) -> SiteResult:
    effects = effects_at(job, path)
    if isinstance(job.method, Factored):
        return _factored(job, job.method, path, effects)
    assert isinstance(job.method, Linear)  # noqa: S101 - the third form is handled apart
    return _linear(job, job.method, effects)


def fits(job: Job) -> bool:
    """Whether the matrices of all sites, whole, are within ``DENSE_BUDGET``."""
    shapes = (linear_shape(job.home.slot(path).layer) for path in job.paths)
    return sum(4 * shape[0] * shape[1] for shape in shapes if shape is not None) <= DENSE_BUDGET


@torch.no_grad()
def exact(job: Job) -> Iterator[tuple[str, Tensor]]:
    """The change D of each weight, (path, (d_out, d_in) float32), one at a time and before a rank limits it."""
    assert isinstance(job.method, Elementwise)  # noqa: S101 - the other forms are exact in factors
    for path, _, dense in _elementwise(job, job.method, job.paths):
        yield path, dense


def effects_at(job: Job, path: str) -> list[Effect]:
    """Each member's effect at ``path``; one that does not act there has a zero effect."""
    effects = []
    for member in job.members:
        effect = effect_of(job.home, path, member.expr)
        if effect.bias is not None:
            raise job.refuse(
                f"{member.expr} moves the bias of {path}, which no LoRA holds",
                "merge biases and gains apart from low-rank deltas",
            )
        effects.append(effect)
    return effects


def _linear(job: Job, method: Linear, effects: Sequence[Effect]) -> SiteResult:
    c = method.coefficients(job.options, _gram(effects) if method.from_gram else len(effects))
    active = [(w, e) for w, e in zip(c, effects, strict=True) if w != 0]
    if any(e.node is not None for _, e in active):
        dense = sum((w * e.dense() for w, e in active), torch.zeros(effects[0].shape, device=effects[0].device))
        return from_dense(dense, None, job.rank)
    pair = factors.stack([e.pair_or_zero() for e in effects], c)
    gains = [w * e.gain for w, e in active if e.gain is not None]
    gain = torch.stack(gains).sum(0) if gains else None
    return shrink(effects[0], pair, gain, job.rank)


def _gram(effects: Sequence[Effect]) -> Tensor:
    if all(e.factored for e in effects):
        return factors.gram([e.pair_or_zero() for e in effects])
    return torch.tensor([[a.inner(b) for b in effects] for a in effects], dtype=torch.float64)


def shrink(site: Effect, pair: Pair, gain: Tensor | None, rank: int | None) -> SiteResult:
    """A pair (and gain) within ``rank`` and the site's own dimensions; the latter costs nothing."""
    most = min(site.shape) if rank is None else min(rank, *site.shape)
    kept, left_out = factors.truncate(pair, most)
    if gain is None and kept is not pair:  # the rows of its A are orthonormal
        energy = factors.energy(kept.B) + left_out
    else:
        energy = Effect(site.layer, site.shape, pair, gain).energy
    lossless = rank is None or rank >= min(site.shape)
    return SiteResult(kept, gain, SiteLoss(kept.rank, energy, 0.0 if lossless else left_out))


def _elementwise(job: Job, method: Elementwise, paths: Sequence[str]) -> Iterator[tuple[str, Sequence[Effect], Tensor]]:
    """Path, the members' effects there, and the merged dense delta."""
    o = job.options
    if method.whole(o):
        everywhere = [effects_at(job, path) for path in paths]
        trims = trimmed(method, o, [[effects[i] for effects in everywhere] for i in range(len(job.members))])
        for j, path in job.steps(list(enumerate(paths)), "merge"):
            trim = [places[j] for places in trims]
            yield path, everywhere[j], at_place(method, o, everywhere[j], trim, _measured(job, path, everywhere[j]))
        return
    for path in job.steps(paths, "merge"):
        effects = effects_at(job, path)
        trims = trimmed(method, o, [[e] for e in effects])
        yield path, effects, at_place(method, o, effects, [t[0] for t in trims], _measured(job, path, effects))


def _measured(job: Job, path: str, effects: Sequence[Effect]) -> Sequence[Tensor] | None:
    if job.statistics is None:
        return None
    for member, effect in zip(job.members, effects, strict=True):
        if effect.gain is not None and effect.node is None:
            raise job.refuse(
                f"{job.method.name} measures entries of a weight, and {member.expr} scales rows of {path} beside them",
                f"lower it first: svd({member.expr}, rank=...)",
            )
    return job.statistics(path)


def _written(job: Job, effects: Sequence[Effect], dense: Tensor, whole: bool) -> SiteResult:
    """The delta in factors: of the rank asked for, or of the members' where that holds it; else whole if it fits."""
    gain: tuple[Tensor, Effect] | None = None
    if any(e.gain is not None for e in effects) and not any(e.node is not None for e in effects):
        # The diagonal part would need full rank: it goes into a gain, merged by the same rule.
        assert isinstance(job.method, Elementwise)  # noqa: S101 - narrows the type
        vectors = torch.stack([torch.zeros(e.rows, device=e.device) if e.gain is None else e.gain for e in effects])
        gain = job.method.combine(vectors[:, None], job.options)[0], effects[0]
    if job.rank or any(e.node is not None for e in effects):
        return from_dense(dense, gain, job.rank)
    result = from_dense(dense, gain, max(1, *(e.rank for e in effects)))
    return from_dense(dense, None, None) if result.loss.discarded and whole else result


def from_dense(dense: Tensor, gain: tuple[Tensor, Effect] | None, rank: int | None) -> SiteResult:
    """A dense merged delta as factors of the given rank, beside a gain on the site's W if there is one.

    Without a rank it stays a matrix, which loses nothing.
    """
    total = factors.energy(dense)
    if not rank:
        nothing = Pair(dense.new_zeros(0, dense.shape[1]), dense.new_zeros(dense.shape[0], 0), 1.0)
        return SiteResult(nothing, None, SiteLoss(min(dense.shape), total, 0.0), dense)
    rest = dense if gain is None else dense - gain[0][:, None] * gain[1].weight()
    pair, left_out = factors.from_dense(rest, min(rank, *rest.shape))
    loss = SiteLoss(pair.rank, total, left_out if rank < min(rest.shape) else 0.0)
    return SiteResult(pair, None if gain is None else gain[0], loss)


def _factored(job: Job, method: Factored, path: str, effects: Sequence[Effect]) -> SiteResult:
    for member, effect in zip(job.members, effects, strict=True):
        if not effect.factored:
            raise job.refuse(
                f"{method.name} merges low-rank deltas, and {member.expr} changes {path} by more than a pair (A, B)",
                f"lower it first: svd({member.expr}, rank=...)",
            )
    measured = () if job.statistics is None else (job.statistics(path),)
    pair = method.on_pairs([e.pair_or_zero() for e in effects], job.options, *measured)
    return shrink(effects[0], pair, None, job.rank)


# -- the new adapter ---------------------------------------------------------------------------------------------


def build(job: Job, results: dict[str, SiteResult]) -> Adapter:
    """A LoRA (or DoRA, with a gain) with these factors, lora_alpha = r, and the merged heads; else whole matrices."""
    if any(m.matrix is not None for m in results.values()):
        return _whole(job, results)
    # One gain makes a DoRA of all sites; where there is none its magnitude is the norm of what is there.
    cls = get_kind("dora" if any(m.gain is not None for m in results.values()) else "lora")
    rank = max([1, *(m.pair.rank for m in results.values())])
    # One config has one rank: that of the site that needs most, which the narrowest must have room for.
    narrow, most = min(
        ((path, min(m.pair.A.shape[1], m.pair.B.shape[0])) for path, m in results.items()), key=lambda p: p[1]
    )
    if rank > most:
        raise job.refuse(
            f"one site needs rank {rank}, and {narrow} has only {most} dimensions",
            f"svd(..., rank={most}) fits everywhere",
        )
    options = {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": tuple(results),
        "modules_to_save": saved_modules(job),
    }
    adapter = cls(make_config(cls, options), job.home.sites, job.home.model, name=job.name).to(job.home.model.device)
    for path, m in results.items():
        # lora_alpha = r is a scale of 1, so what pads the factors to r is zeros and changes nothing.
        pair = factors.pad(m.pair, rank)
        if cls.kind == "dora":
            pair, magnitude = _decomposed(job, path, pair, m.gain)
            adapter.at(path, "magnitude").data = magnitude
        adapter.at(path, "A").data, adapter.at(path, "B").data = pair.A.contiguous(), pair.B.contiguous()
    if adapter.saved:
        adapter.load_state({**adapter.state(heads=False), **merge_heads(job, adapter.head_state())})
    return adapter.freeze()


def _whole(job: Job, results: dict[str, SiteResult]) -> Adapter:
    """A dense adapter: some site has no low rank, and none was asked for."""
    cls = get_kind("dense")
    options = {"target_modules": tuple(results), "biases": False, "modules_to_save": saved_modules(job)}
    adapter = cls(make_config(cls, options), job.home.sites, job.home.model, name=job.name).to(job.home.model.device)
    for path, m in results.items():
        site = effect_of(job.home, path, job.members[0].expr)
        matrix = m.matrix if m.matrix is not None else Effect(site.layer, site.shape, m.pair, m.gain).dense()
        adapter.at(path, "weight").data = matrix.contiguous()
    if adapter.saved:
        adapter.load_state({**adapter.state(heads=False), **merge_heads(job, adapter.head_state())})
    return adapter.freeze()


def _decomposed(job: Job, path: str, pair: Pair, gain: Tensor | None) -> tuple[Pair, Tensor]:
    """diag(g) W + B A as a DoRA: factors (A, B / g) and m = g ||W + (B / g) A||_row."""
    site = effect_of(job.home, path, job.members[0].expr)
    g = torch.ones(site.rows, device=site.device) if gain is None else 1 + gain
    if bool((g == 0).any()):
        raise job.refuse(f"the gains at {path} add up to zero in {int((g == 0).sum())} rows: no DoRA does that")
    b = pair.B / g[:, None]
    wa = site.weight() @ pair.A.T  # (d_out, r)
    squared = row_norm_squared(site.layer) + 2 * (wa * b).sum(1) + ((b @ (pair.A @ pair.A.T)) * b).sum(1)
    return Pair(pair.A, b, 1.0), g * squared.clamp_min(0).sqrt()
