"""The laws of routing, for every scorer over experts of mixed kinds, on a base in full and in four-bit precision.

The grid is scorer x experts x precision; a scorer that cannot route a kind refuses it, and the last test holds that to
the kinds named here.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

import compose
from compose.errors import KindError
from hub.errors import UsageError
from router import Ensemble
from router.bench import Batch, Bench
from router.router import Router
from router.scorer import SCORERS, RowScorer

POOLS = {  # a, b and d of a pool: d is the one that goes
    "weights": ("lora", "dora", "dense"),
    "linear": ("lora", "ia3", "dora"),
    "blocks": ("lora", "bottleneck", "bias"),
    "rows": ("prefix", "lora", "ia3"),
}
METHODS = sorted(SCORERS)
REFUSED = {
    "arrow": {"linear", "blocks", "rows"},  # there is a direction only in a change of weights
    **{method: {"rows"} for method in ("phatgoose", "gate", "fuse", "smear")},  # no gate at a site weighs a prefix
}
GRID = [
    (method, pool, dtype)
    for method in METHODS
    for pool in POOLS
    for dtype in (("fp32", "nf4") if pool in ("weights", "linear") else ("fp32",))
    if pool not in REFUSED.get(method, set())
]
TOLERANCE = {"fp32": 5e-5, "nf4": 5e-4}


def bench_of(tiny, pool, dtype):
    """Three experts, each with rows of its own part of the vocabulary."""
    model = tiny.model("llama", dtype)
    for seed, (name, kind) in enumerate(zip("abd", POOLS[pool], strict=True)):
        options = {"target_modules": "all-linear"} if kind in ("lora", "dora", "dense") else {}
        tiny.adapter(model, kind, name, seed=seed, noise=0.1, **options).freeze()
    draw = torch.Generator().manual_seed(0)
    rows = {
        name: [torch.randint(4 + 16 * i, 20 + 16 * i, (9,), generator=draw) for _ in range(5)]
        for i, name in enumerate("abd")
    }
    return Bench(model, {name: name for name in "abd"}, rows, batch_size=5)


def fitted(bench, method):
    options = {"steps": 2} if "steps" in SCORERS.get(method).Options.model_fields else {}
    return Router.fit(method, bench, options=options)


def batch_of(bench, order="bad", tasks="bab"):
    return Batch.of([bench.rows[name][i] for i, name in enumerate(order)], pad=1, tasks=tuple(tasks))


def logits(router, bench, batch):
    with torch.no_grad(), router.routed(bench.model, batch):
        return bench.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()


def ruling_out(router, name):
    """The router with one expert that gets -inf for every row and every token."""
    place, scorer = torch.tensor([list(router.experts).index(name)]), copy.copy(router.scorer)
    if isinstance(scorer, RowScorer):
        scorer.score = lambda *given: router.scorer.score(*given).index_fill(-1, place, -math.inf)
    else:

        def scores(statistics):
            inner = router.scorer.scores(statistics)
            return lambda path, x: None if (s := inner(path, x)) is None else s.index_fill(-1, place, -math.inf)

        scorer.scores = scores
    return replace(router, scorer=scorer)


@pytest.mark.parametrize(("method", "pool", "dtype"), GRID)
def test_the_laws_of_routing(tiny, method, pool, dtype):
    bench, near = bench_of(tiny, pool, dtype), TOLERANCE[dtype]
    router, batch = fitted(bench, method), batch_of(bench)
    routed = logits(router, bench, batch)

    turned = replace(router, experts=dict(reversed(router.experts.items())))
    assert torch.allclose(logits(turned, bench, batch), routed, atol=near), "the order of experts does not matter"

    alone = router.without("d").without("a")
    asked = replace(batch, tasks=("b",) * 3)
    compose.activate(bench.model, "b")
    with torch.no_grad():
        single = bench.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()
    assert torch.allclose(logits(alone, bench, asked), single, atol=near), "one-hot is the single expert"

    others = batch_of(bench, "bbb", "bbd")
    others.input_ids[0] = batch.input_ids[0]
    there = logits(router, bench, others)[0]
    assert torch.allclose(there, routed[0], atol=near), "other neighbours of the same shape do not matter"

    if method != "fuse":  # whose experts all have a weight
        rest = router.without("d")
        assert torch.equal(logits(ruling_out(router, "d"), bench, batch), logits(rest, bench, batch)), (
            "an expert of zero weight changes no bit, and one that is removed is as if it had never been there"
        )
    if not SCORERS.get(method).joint:
        compose.detach(bench.model, "d")
        never = fitted(replace(bench, experts={"a": "a", "b": "b"}), method)
        assert torch.equal(logits(never, bench, batch), logits(router.without("d"), bench, batch))


@pytest.mark.parametrize(("pool", "dtype"), sorted({point[1:] for point in GRID}))
@pytest.mark.parametrize("prior", [None, [0.7, 0.2, 0.1]])
def test_the_mixture_is_never_worse_than_an_expert_by_more_than_its_prior(tiny, pool, dtype, prior):
    """NLL(mixture) <= NLL(e) + ln(1 / prior(e)), for every text and every expert, and the bare base among them."""
    bench = bench_of(tiny, pool, dtype)
    texts = torch.stack([row for rows in bench.rows.values() for row in rows])
    members = ["a", "b", None]
    score = Ensemble(bench.model, members, prior="uniform" if prior is None else prior).score(texts)
    for e, weight in enumerate(prior or [1 / 3] * 3):
        bound = score.expert_nll[e] + math.log(1 / weight)
        assert bool((score.nll <= bound + 1e-9).all())
    turned = Ensemble(bench.model, members[::-1], prior="uniform" if prior is None else prior[::-1]).score(texts)
    assert torch.allclose(score.nll, turned.nll, atol=1e-2 if dtype == "nf4" else 1e-3)


@pytest.mark.parametrize("method", ["phatgoose", "gate", "fuse"])
def test_what_acts_at_a_norm_is_weighed_there_too(tiny, method):
    model = tiny.model("gpt2")
    for seed, name in enumerate("ab"):
        tiny.adapter(model, "bias", name, seed=seed, noise=0.1).freeze()
    assert any("ln_1" in path for path in compose.runtime.model_runtime.runtime(model).adapter("a").paths)
    rows = {name: [torch.arange(4 + seed, 12 + seed)] for seed, name in enumerate("ab")}
    bench = Bench(model, {"a": "a", "b": "b"}, rows)
    router, batch = fitted(bench, method), Batch.of([rows["a"][0]])
    compose.activate(model, "a")
    with torch.no_grad():
        single = model(input_ids=batch.input_ids).logits
    assert torch.allclose(logits(router.without("b"), bench, batch), single, atol=5e-5)


@pytest.mark.parametrize("method", sorted(REFUSED))
def test_what_is_not_in_the_grid_is_refused(tiny, method):
    for pool in REFUSED.get(method, ()):
        bench = bench_of(tiny, pool, "fp32")
        with pytest.raises((UsageError, KindError)):
            logits(fitted(bench, method), bench, batch_of(bench))
