"""Arrow: each token goes to the experts whose strongest direction it lies along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compose.atoms import Atoms
from compose.expr import Ref
from compose.factors import core
from compose.inject import runtime
from compose.kernels import Pair
from compose.kind import Adapter
from compose.slot import BelowView
from hub.errors import UsageError
from router.bench import Bench, tree
from router.gating import Gating
from router.scorer import ScorerOptions, SiteScorer, SiteScores, Statistics, register
from router.sitewise import Table


class ArrowOptions(ScorerOptions):
    """How a token is brought to one scale before it is compared."""

    normalize: Literal["layer", "none"] = Field(
        "layer",
        description="layer: LayerNorm without parameters on what enters the site; none: as it comes, as in PEFT",
    )


@register("arrow")
class Arrow(SiteScorer):
    """score_e = |p_e . x| with p_e the top right-singular vector of D_e = s_e B_e A_e (arXiv 2405.11157).

    The vector is exact: QR(A^T), QR(B) and the SVD of the small core (`compose.factors.core`), where PEFT takes 15
    power iterations. It needs no text at all, so a member is added from its weights alone.
    """

    Options = ArrowOptions
    paper = "arXiv 2405.11157"
    gating = Gating(top_k=3)
    needs_data = False

    def measure(self, expert: str, bench: Bench) -> Statistics:
        """One unit vector (d_in,) for each site where the expert changes the weight."""
        found, what = runtime(bench.model), tree(bench.experts[expert])
        if not isinstance(what, Ref):
            raise UsageError(
                f"arrow reads the direction of one adapter, and {expert!r} is {what}", hint="merge it first"
            )
        adapter = found.adapter(what.text)
        vectors: dict[str, Tensor] = {}
        for path in adapter.paths:
            vector = _direction(adapter.lower(path, BelowView(found.slot(path), ())), adapter, path)
            if vector is not None:
                vectors[path] = vector.cpu()
        return vectors

    def scores(self, statistics: Mapping[str, Statistics]) -> SiteScores:
        """|P x| with the prototypes P (E, d_in) of the site."""
        table = Table(statistics)

        def score(path: str, x: Tensor) -> Tensor | None:
            vectors = table.at(path, "", x)
            if vectors is None:
                return None
            x = x.float()
            x = F.layer_norm(x, x.shape[-1:]) if self.options.normalize == "layer" else x
            return table.spread(path, (x @ vectors.T).abs_())

        return score


def _direction(atoms: Atoms | None, adapter: Adapter, path: str) -> Tensor | None:
    """Top right-singular vector of an adapter's change of weight at a site; None where it changes nothing."""
    if atoms is None or (atoms.A is None and atoms.delta is None):
        raise UsageError(
            f"{adapter.kind} adapter {adapter.name!r} changes no weight at {path}, so it has no direction there",
            hint="arrow routes lora, dora, sparse and dense adapters; phatgoose and gate route every kind",
        )
    with torch.no_grad():
        if atoms.A is not None and atoms.B is not None:
            _, s, vh = core(Pair(atoms.A.detach(), atoms.B.detach(), atoms.scale))
        else:
            assert atoms.delta is not None  # noqa: S101 - it has one or the other
            _, s, vh = torch.linalg.svd(atoms.delta.dense().detach().float(), full_matrices=False)
    return vh[0].float() if float(s[0]) > 0 else None
