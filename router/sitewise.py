"""What scorers at sites share: vectors of all experts side by side, the gate made of scores, and learning gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import compose
from compose.runtime.model_runtime import runtime
from router.bench import Bench, Experts
from router.gating import Gating
from router.scorer import Recorder, SiteScores, Statistics

NONE = float("-inf")


class SiteVectors:
    """Statistics by site: the vectors (P, d) of the P experts that have one there, side by side.

    ``suffix`` tells the tensors of one site apart: a statistic is called ``path`` or ``path/suffix``.
    """

    def __init__(self, statistics: Mapping[str, Statistics]) -> None:
        self._experts = list(statistics.values())
        self._made: dict[tuple[str, str, torch.device], Tensor | None] = {}
        self._present: dict[str, Tensor] = {}

    def at(self, path: str, suffix: str, like: Tensor) -> Tensor | None:
        """Tensors at a site stacked (P, ...), float32 on the device of `like`; None where nobody has one."""
        key = path, suffix, like.device
        if key not in self._made:
            with torch.inference_mode(False):
                self._made[key] = self._stack(f"{path}/{suffix}" if suffix else path, path, like.device)
        return self._made[key]

    def _stack(self, name: str, path: str, device: torch.device) -> Tensor | None:
        vectors = {i: s[name] for i, s in enumerate(self._experts) if name in s}
        if not vectors:
            return None
        self._present[path] = torch.tensor(list(vectors), device=device)
        return torch.stack(list(vectors.values())).to(device, torch.float32)

    def spread(self, path: str, scores: Tensor) -> Tensor:
        """From scores of the P experts of this site (..., P) to all (..., E): -inf for those that have nothing here."""
        present = self._present[path]
        if len(present) == len(self._experts):
            return scores
        full = scores.new_full((*scores.shape[:-1], len(self._experts)), NONE)
        return full.index_copy(-1, present, scores)


class SiteGate:
    """A `compose.slots.gate.Gate`: scores, then the gating; a site without any scores gives no expert weight."""

    def __init__(self, scores: SiteScores, gating: Gating, experts: int, record: Recorder | None = None) -> None:
        self.scores, self.gating, self.experts, self.record = scores, gating, experts, record

    def __call__(self, path: str, x: Tensor) -> Tensor:
        """Weights (B or 1, T or 1, E)."""
        scores = self.scores(path, x)
        weights = x.new_zeros(1, 1, self.experts) if scores is None else self.gating(scores)
        if self.record is not None:
            self.record(path, weights.detach().expand(*x.shape[:2], self.experts))
        return weights


def learn(
    bench: Bench,
    experts: Experts,
    gate: Any,
    parameters: Sequence[nn.Parameter],
    *,
    names: Sequence[str],
    steps: int,
    lr: float,
    penalty: Callable[[], Tensor] | None = None,
    what: str = "gates",
) -> list[float]:
    """Train the parameters of a gate while base and experts stay frozen; returns the loss of each step.

    Batches come from the rows of `names` in turn. AdamW without decay, a linear warm-up over the first tenth. What was
    active in the model, and whether adapters trained, is afterwards as before.
    """
    model_runtime, model = runtime(bench.model), bench.model
    before = model_runtime.rows, model_runtime.weights, model_runtime.routing
    live = [a for a in model_runtime.adapters.values() if a.trainable]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(bench.seed)
    losses: list[float] = []
    for adapter in live:
        adapter.freeze()
    try:
        compose.route(model, list(experts.values()), gate)
        for step in range(steps):
            name = names[step % len(names)]
            with torch.enable_grad():
                loss = bench.loss(model, bench.draw(name, generator), name)
                total = loss if penalty is None else loss + penalty()
                optimizer.zero_grad(set_to_none=True)
                total.backward()  # type: ignore[no-untyped-call]
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / max(1, steps // 10))
            optimizer.step()
            losses.append(float(loss.detach()))
            bench.tell(what, step + 1, steps)
    finally:
        for adapter in live:
            adapter.unfreeze()
        model_runtime.activate(*before)
    return losses
