"""Arrow: each token goes to the experts whose strongest direction it lies along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compose.atoms import Atoms
from compose.expr.tree import Ref
from compose.kernels.factors import core, stack
from compose.kernels.low_rank import Pair
from compose.kind.adapter import Adapter
from compose.parameter_space.effect import entries
from compose.parameter_space.execute import Workspace
from compose.runtime.model_runtime import runtime
from compose.slots.lowering import site_program
from hub.errors import UsageError
from router.bench import Bench, tree
from router.gating import Gating
from router.scorer import ScorerOptions, SiteScorer, SiteScores, Statistics, register
from router.sitewise import SiteVectors


class ArrowOptions(ScorerOptions):
    """How a token is brought to one scale before it is compared."""

    normalize: Literal["layer", "none"] = Field(
        "layer",
        description="layer: LayerNorm without parameters on what enters the site; none: as it comes, as in PEFT",
    )


@register("arrow")
class Arrow(SiteScorer):
    """`score_e = |p_e . x|`, p_e the top right-singular vector of `D_e = s_e B_e A_e` (arXiv 2405.11157).

    The vector is exact: `QR(A^T)`, `QR(B)` and the SVD of the small core (`compose.kernels.factors.core`); PEFT takes
    15 power iterations. It needs no text at all, so a member is added from its weights alone.
    """

    Options = ArrowOptions
    paper = "arXiv 2405.11157"
    gating = Gating(top_k=3)
    needs_data = False

    def measure(self, expert: str, bench: Bench) -> Statistics:
        """One unit vector (d_in,) for each site where the expert changes the weight."""
        model_runtime, what = runtime(bench.model), tree(bench.experts[expert])
        if not isinstance(what, Ref):
            raise UsageError(
                f"arrow reads the direction of one adapter, and {expert!r} is {what}", hint="merge it first"
            )
        adapter, workspace = model_runtime.adapter(what.text), Workspace(model_runtime)
        vectors: dict[str, Tensor] = {}
        for path in adapter.module_paths:
            node = site_program(workspace, path, (what,))
            vector = _direction([] if node is None else [e.atoms for e in entries(node)], adapter, path)
            if vector is not None:
                vectors[path] = vector.cpu()
        return vectors

    def scores(self, statistics: Mapping[str, Statistics]) -> SiteScores:
        """`|P x|` with the prototypes P (E, d_in) of the site."""
        table = SiteVectors(statistics)

        def score(path: str, x: Tensor) -> Tensor | None:
            vectors = table.at(path, "", x)
            if vectors is None:
                return None
            x = x.float()
            x = F.layer_norm(x, x.shape[-1:]) if self.options.normalize == "layer" else x
            return table.spread(path, (x @ vectors.T).abs_())

        return score


def _direction(atoms: Sequence[Atoms], adapter: Adapter, path: str) -> Tensor | None:
    """Top right-singular vector of an adapter's change of weight at a site; None where it changes nothing."""
    deltas = [a.delta for a in atoms if a.delta is not None]
    pairs = [Pair(a.A.detach(), a.B.detach(), a.scale) for a in atoms if a.A is not None and a.B is not None]
    if not deltas and not pairs:
        raise UsageError(
            f"{adapter.kind} adapter {adapter.name!r} changes no weight at {path}, so it has no direction there",
            hint="arrow routes lora, dora, sparse and dense adapters; phatgoose and gate route every kind",
        )
    with torch.no_grad():
        if pairs:  # several at parts of a fused linear
            _, s, vh = core(pairs[0] if len(pairs) == 1 else stack(pairs, [1.0] * len(pairs)))
        else:
            dense = torch.stack([delta.dense().detach().float() for delta in deltas]).sum(0)
            _, s, vh = torch.linalg.svd(dense, full_matrices=False)
    return vh[0].float() if float(s[0]) > 0 else None
