"""The backends of the low-rank mixture, beside the frozen linear they are added to. Sets the thresholds of `choose`.

    python tests/benchmarks/bench_kernels.py [--width 512] [--rank 8] [--json FILE|-]

Each case runs over several layers with weights of their own, so that no factor stays in the cache from one call to the
next, as in a model. Every figure is the time of linear + backend over that of the linear alone: the median over rounds,
all run in turn. ``chosen`` is what `choose` takes; a dash marks a backend left out because it would take minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bench_tools import interleave, machine, ratio, report, shape_options
from torch import Tensor
from torch.nn import functional as F

from compose.kernels.low_rank import BACKENDS, Pair, choose, for_all

FAST = ("stacked", "gather")


@dataclass(frozen=True)
class Case:
    """``rows`` x ``length`` tokens, ``experts`` of them in the pool, ``active`` a row or, if ``routed``, a token."""

    rows: int
    length: int
    experts: int
    active: int = 1
    routed: bool = False

    def weights(self) -> Tensor:
        """(R, E), or (R, T, E)."""
        shape = (self.rows, self.length) if self.routed else (self.rows,)
        if self.experts == 1:
            return torch.ones(*shape, 1)
        scores = torch.rand(*shape, self.experts) if self.active > 1 else _dealt(*shape, self.experts)
        chosen = scores.topk(self.active, dim=-1)
        return torch.zeros(*shape, self.experts).scatter(-1, chosen.indices, 1.0 / self.active)


def _dealt(*shape: int) -> Tensor:
    """Scores that deal the experts out in turn."""
    places = torch.arange(torch.Size(shape[:-1]).numel()) % shape[-1]
    return F.one_hot(places, shape[-1]).float().view(shape)


CASES = [
    *(Case(32, 1, e) for e in (1, 2, 3, 4, 8, 16, 32, 64)),
    Case(32, 1, 8, active=4),
    *(Case(32, 32, e) for e in (1, 2, 3, 4, 8, 32)),
    *(Case(4, 128, e) for e in (2, 4)),
    *(Case(8, 32, e, active=2, routed=True) for e in (4, 8, 16, 32, 64)),
    *(Case(8, 128, e, active=2, routed=True) for e in (8, 16, 32)),
    *(Case(32, 1, e, active=2, routed=True) for e in (8, 32)),
]


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many")
    shape_options(parser, width=512, rank=8, layers=12, rounds=11)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = [measure(case, options) for case in CASES[: options.cases]]
    columns = ("rows", "length", "experts", "active", "routed", *BACKENDS, "chosen")
    report({"machine": machine(), "model": vars(options), "rows": rows}, columns, options.json, sys.stdout)


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    d, weights = options.width, case.weights()
    layers = [torch.randn(d, d) / d**0.5 for _ in range(options.layers)]
    pools = [
        [Pair(torch.randn(options.rank, d), torch.randn(d, options.rank) / d, 1.0) for _ in range(case.experts)]
        for _ in layers
    ]
    x = torch.randn(case.rows, case.length, d)
    # A mixture for all rows has one row of weights.
    single = case.experts == 1
    names = list(_backends(case))
    prepared = {
        name: [for_all(pool) if single and name == "stacked" else BACKENDS[name](pool, weights) for pool in pools]
        for name in names
    }
    calls = {"linear": lambda: [F.linear(x, w) for w in layers]}
    for name in names:
        calls[name] = lambda name=name: [
            run(F.linear(x, w), x, fresh=True) for w, run in zip(layers, prepared[name], strict=True)
        ]
    times = interleave(calls, options.rounds)
    found = {name: ratio(times[name], times["linear"]) if name in names else "-" for name in BACKENDS}
    chosen = "stacked" if single else choose([options.rank] * case.experts, weights)
    return {**vars(case), **found, "chosen": chosen}


def _backends(case: Case) -> Iterator[str]:
    for name in BACKENDS:
        if name == "gather" and case.routed:
            continue  # it takes weights per row
        if name in FAST or name == "grouped" or case.experts <= 4:
            yield name


if __name__ == "__main__":
    main()
