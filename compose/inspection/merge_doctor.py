"""The doctor for others' merges: recompute what a merged adapter should be, and say where and why it is not.

A result D is held against the exact merge of its members, task vectors tau_i combined as the method says, site by
site: the relative error ||D - D*|| / ||D*||, the factor of D* that is nearest to D, and their cosine. The weights that
explain D best, and how much of D no weights explain, tell a wrong factor from wrong mathematics; known recipes are
recomputed to name the cause.

What is compared are changes of weights, never A and B apart. For low-rank results all of it happens in the space that
the members' factors span, so nothing of d_out x d_in is formed (entrywise methods excepted).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compose.function import get_function
from compose.inspection.merge_doctor_places import Case, Place, places, prescription
from compose.planning.members import AdapterFinder, StoredAdapter
from hub.console.progress import Steps
from hub.errors import UsageError

__all__ = ["Diagnosis", "SiteDiscrepancy", "examine"]

TOLERANCE = 1e-3  # relative error up to which a merge counts as exact: bfloat16 files round by 4e-3 / sqrt(12)
_RECOGNISED = 2e-3  # relative error up to which a recipe counts as the one that was used
_EXPLAINED = 1e-2  # share of a result outside the span of its members that is put down to rounding
_NAMED = 4  # sites or members that are named in a finding


@dataclass(frozen=True)
class SiteDiscrepancy:
    """One site: relative error, nearest factor of the exact merge, cosine to it, and ||D*||."""

    path: str
    error: float
    factor: float
    cosine: float
    norm: float


@dataclass(frozen=True)
class Diagnosis:
    """What was found. ``fitted`` are the weights that explain the result best, ``unexplained`` the share they do not.

    ``recipe`` is the known way of merging that reproduces the result, if one does, within ``recipe_error``.
    """

    result: str
    members: tuple[str, ...]
    weights: tuple[float, ...]
    method: str
    kind: str
    error: float
    sites: tuple[SiteDiscrepancy, ...]
    fitted: tuple[float, ...]
    unexplained: float
    recipe: str | None
    recipe_error: float | None
    findings: tuple[str, ...]
    remedy: str
    tolerance: float = TOLERANCE

    @property
    def sound(self) -> bool:
        """Whether the result is the exact merge, within the tolerance."""
        return self.error <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        plain = {name: value for name, value in vars(self).items() if name != "sites"}
        return {"sound": self.sound, **plain, "sites": [vars(site) for site in self.sites]}


def examine(
    result: str,
    members: Sequence[str],
    finder: AdapterFinder,
    *,
    weights: Sequence[float] | None = None,
    method: str = "task_arithmetic",
    density: float | None = None,
    base: str | Path | None = None,
    tolerance: float = TOLERANCE,
    progress: Steps | None = None,
) -> Diagnosis:
    """Hold a merged adapter against the exact merge of its members.

    Parameters
    ----------
    result, members
        Directories or refs, in the order of ``weights``.
    weights
        One number per member; default: equal shares of 1, a mean.
    method
        What it was meant to be: a merge function. ``task_arithmetic`` is the weighted sum, which PEFT calls linear, cat
        or svd.
    density
        For methods that prune; it also lets PEFT's pruning recipes be recognised.
    base
        Needed where the effect of an adapter depends on the base's weights (dora).

    Raises
    ------
    UsageError, HubError
        A method that cannot be recomputed, adapters of different kinds, or files that cannot be read.
    """
    case = _case(result, members, finder, weights, method, density)
    sums = _Sums(len(members))
    sites = []
    for place in places(case, finder, base, progress):
        sites.append(_discrepancy(place))
        sums.add(place)
    fitted, unexplained = sums.fit()
    recipe = sums.recipe()
    error = math.sqrt(sums.gap / sums.exact) if sums.exact else float(sums.gap > 0)
    diagnosis = Diagnosis(
        result=result,
        members=tuple(members),
        weights=case.weights,
        method=method,
        kind=case.result.facts.kind,
        error=error,
        sites=tuple(sites),
        fitted=fitted,
        unexplained=unexplained,
        recipe=recipe[0] if recipe else None,
        recipe_error=recipe[1] if recipe else None,
        findings=(),
        remedy=prescription(case),
        tolerance=tolerance,
    )
    return _with_findings(diagnosis, case)


def _case(
    result: str,
    members: Sequence[str],
    finder: AdapterFinder,
    weights: Sequence[float] | None,
    method: str,
    density: float | None,
) -> Case:
    if not members:
        raise UsageError("a merge has members", hint="hub compose doctor DIR --members A B ...")
    given = [1 / len(members)] * len(members) if weights is None else [float(w) for w in weights]
    if len(given) != len(members):
        raise UsageError(f"there are {len(members)} members and {len(given)} weights", hint="one weight a member")
    if get_function(method).family != "merge":
        raise UsageError(f"{method} merges no parameters", hint="hub compose functions lists the merges")
    stored = [finder.find(member) for member in members]
    return Case(finder.find(result), tuple(stored), tuple(given), method, density)


def _discrepancy(place: Place) -> SiteDiscrepancy:
    exact, got = place.exact, place.result
    norm, own = float(exact.norm()), float(got.norm())
    inner = float((exact * got).sum())
    gap = float((got - exact).norm())
    error = gap / norm if norm else float(own > 0)
    factor = inner / norm**2 if norm else 0.0
    return SiteDiscrepancy(place.path, error, factor, inner / (norm * own) if norm and own else 0.0, norm)


@dataclass
class _Sums:
    """What is added up over the sites."""

    count: int
    gap: float = 0.0
    exact: float = 0.0
    own: float = 0.0
    gram: Tensor = field(default_factory=lambda: torch.zeros(0))
    onto: Tensor = field(default_factory=lambda: torch.zeros(0))
    recipes: dict[str, float] = field(default_factory=dict)
    seen: int = 0

    def add(self, place: Place) -> None:
        rows = torch.stack([tau.flatten() for tau in place.members])  # (N, numbers of the place)
        got = place.result.flatten()
        if not self.seen:
            self.gram, self.onto = torch.zeros(self.count, self.count).double(), torch.zeros(self.count).double()
        self.gram += rows @ rows.T
        self.onto += rows @ got
        self.gap += float((place.result - place.exact).square().sum())
        self.exact += float(place.exact.square().sum())
        self.own += float(got.square().sum())
        names = place.recipes.keys() if not self.seen else self.recipes.keys() & place.recipes.keys()
        self.recipes = {
            name: self.recipes.get(name, 0.0) + float((place.recipes[name] - place.result).square().sum())
            for name in names
        }
        self.seen += 1

    def fit(self) -> tuple[tuple[float, ...], float]:
        """Weights v of the least ||D - sum_i v_i tau_i||, and the share of ||D|| that is left."""
        if not self.own:
            return (0.0,) * self.count, 0.0
        v = torch.linalg.lstsq(self.gram, self.onto[:, None], driver="gelsd").solution[:, 0]
        rest = self.own - 2 * float(v @ self.onto) + float(v @ self.gram @ v)
        return tuple(v.tolist()), math.sqrt(max(0.0, rest) / self.own)

    def recipe(self) -> tuple[str, float] | None:
        """The recipe that is nearest to the result, if it is near enough."""
        if not self.recipes or not self.own:
            return None
        name = min(self.recipes, key=self.recipes.__getitem__)
        error = math.sqrt(self.recipes[name] / self.own)
        return (name, error) if error <= _RECOGNISED else None


# -- findings ------------------------------------------------------------------------------------------------------


def _with_findings(diagnosis: Diagnosis, case: Case) -> Diagnosis:
    said = [*_placement(diagnosis)]
    if not diagnosis.sound:
        said += _factor(diagnosis, case) or _outside(diagnosis)
        said += _of_kind(diagnosis, case.members)
    return replace(diagnosis, findings=tuple(said))


def _placement(diagnosis: Diagnosis) -> list[str]:
    absent = [site.path for site in diagnosis.sites if site.norm and site.factor == 0 and site.cosine == 0]
    alone = [site.path for site in diagnosis.sites if not site.norm and site.error]
    findings = []
    if absent:
        findings.append(f"it does nothing at {_few(absent)}, where its members act")
    if alone:
        findings.append(f"it acts at {_few(alone)}, where no member does")
    return findings


def _factor(diagnosis: Diagnosis, case: Case) -> list[str]:
    """Causes of a result that is a multiple of the exact merge, or a sum with other weights."""
    if diagnosis.unexplained > _EXPLAINED or diagnosis.method not in ("task_arithmetic", "average", "cat", "svd"):
        return []
    ratios = [v / w for v, w in zip(diagnosis.fitted, case.coefficients, strict=True) if w]
    factor = sum(ratios) / len(ratios)
    if not all(math.isclose(r, factor, rel_tol=1e-2) for r in ratios):
        weights = ", ".join(f"{v:.4g}" for v in diagnosis.fitted)
        return [f"it is the exact sum with other weights: {weights}"]
    findings = [f"it is the exact merge times {factor:.4g}"]
    n, config = len(diagnosis.members), case.result.config
    rank = int(config.get("r") or 0)
    if n > 1 and math.isclose(factor, 1 / n, rel_tol=1e-2):
        findings.append(f"1 / {n}: a mean of {n} was divided by {n} once more, as adapters' Average does")
    elif rank > 1 and config.get("use_rslora") and math.isclose(factor, math.sqrt(rank), rel_tol=1e-2):
        findings.append(
            f"sqrt({rank}): its factors were made for a scale of 1, but its config keeps use_rslora, which makes the "
            f"scale lora_alpha / sqrt(r) = {math.sqrt(rank):.4g}; set use_rslora to false to mend it"
        )
    return findings


def _outside(diagnosis: Diagnosis) -> list[str]:
    if diagnosis.recipe and "apart" in diagnosis.recipe:
        return [
            "A and B were merged apart, so their product holds cross terms B_i A_j of different adapters: "
            f"{100 * diagnosis.unexplained:.0f}% of it is no combination of its members"
        ]
    if diagnosis.recipe and "neutral" in diagnosis.recipe:
        return ["gains multiply, so the one that changes nothing is 1: of a sum, all but one 1 has to be taken off"]
    if diagnosis.recipe and "at rank" in diagnosis.recipe:
        return ["its rank cannot hold the merge; what it leaves out is the least that this rank allows"]
    if diagnosis.unexplained > _EXPLAINED:
        return [f"{100 * diagnosis.unexplained:.0f}% of it is no combination of its members, whatever the weights"]
    return []


def _of_kind(diagnosis: Diagnosis, members: Sequence[StoredAdapter]) -> list[str]:
    if any(stored.facts.kind == "dora" for stored in members):
        return ["its members are DoRAs: PEFT merges their factors and leaves their magnitudes out"]
    if any(stored.config.get("use_rslora") for stored in members) and diagnosis.recipe is None:
        return ["its members use rsLoRA: check that the scale of the result is the one its factors were made for"]
    return []


def _few(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - _NAMED} more sites" if len(paths) > _NAMED else ""
    return ", ".join(paths[:_NAMED]) + more
