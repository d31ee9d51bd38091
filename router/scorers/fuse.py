"""AdapterFusion: attention over what the experts answer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from compose.runtime.model_runtime import runtime
from hub.errors import UsageError
from router.bench import Bench, sites_of
from router.scorer import SHARED, Recorder, ScorerOptions, SiteScorer, SiteScores, Statistics, register
from router.sitewise import learn


class FuseOptions(ScorerOptions):
    """Size of the attention, and its training."""

    size: int = Field(32, ge=1, description="width of queries and keys")
    steps: int = Field(200, ge=1, description="steps of training")
    lr: float = Field(1e-3, gt=0, description="learning rate")


@register("fuse")
class Fuse(SiteScorer):
    """`y + sum_e softmax_e(q(y) . k(z_e) / sqrt(n)) z_e`, with z_e the change that expert e makes at the site.

    AdapterFusion (arXiv 2005.00247) with queries and keys of width n learned at each site, and the values left as they
    are, as they are at its own initialization. Every expert is computed for every token: for a handful of experts of
    any kinds. The attention is shared by the experts and learned on all of them; so is what one more would need.
    """

    Options = FuseOptions
    paper = "arXiv 2005.00247"
    joint = True

    def fit(self, bench: Bench) -> dict[str, Statistics]:
        """Train queries and keys at each site; the experts have no statistics of their own."""
        bench.need_data()
        model_runtime, generator = runtime(bench.model), torch.Generator().manual_seed(bench.seed)
        known = {**model_runtime.sites.sites, **model_runtime.sites.outside}
        shared: dict[str, nn.Parameter] = {}
        for path, width in sites_of(bench.model, bench.experts).items():
            d = known[path].out_features if path in known else width  # of a norm
            for part in ("query", "key"):
                start = torch.randn(self.options.size, d, generator=generator) / d**0.5
                shared[f"{path}/{part}"] = nn.Parameter(start.to(bench.model.device))
        learn(
            bench,
            bench.experts,
            _Attention(shared),
            list(shared.values()),
            names=list(bench.experts),
            steps=self.options.steps,
            lr=self.options.lr,
        )
        return {
            SHARED: {name: value.detach().cpu() for name, value in shared.items()},
            **{expert: {} for expert in bench.experts},
        }

    def scores(self, statistics: Mapping[str, Statistics]) -> SiteScores:
        """Refuse: the weights depend on the experts' answers; see `mixer`."""
        raise UsageError("fuse has no scores before the experts have answered", hint="route with its mixer")

    def mixer(self, statistics: Mapping[str, Statistics], record: Recorder | None = None) -> _Attention:
        """The attention."""
        return _Attention(statistics.get(SHARED, {}), record)


class _Attention:
    """A `compose.slots.gate.Mixer`."""

    def __init__(self, tensors: Mapping[str, Tensor], record: Recorder | None = None) -> None:
        self.tensors, self.record = tensors, record

    def mix(self, path: str, y: Tensor, deltas: Tensor) -> Tensor:
        """`y` (B, T, d) plus the attended deltas (B, T, E, d)."""
        if f"{path}/query" not in self.tensors or f"{path}/key" not in self.tensors:
            raise UsageError(f"no attention was learned at {path}", hint="fit it again with these experts")
        query, key = (self.tensors[f"{path}/{part}"].to(y.device) for part in ("query", "key"))  # (n, d)
        q, k = y.float() @ query.T, deltas.float() @ key.T  # (B, T, n), (B, T, E, n)
        w = ((k @ q[..., None]) / q.shape[-1] ** 0.5).softmax(-2)  # (B, T, E, 1)
        if self.record is not None:
            self.record(path, w[..., 0].detach())
        mixed: Tensor = y + (w.to(deltas.dtype) * deltas).sum(-2)
        return mixed
