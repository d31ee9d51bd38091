"""What every scorer promises, for each one in the registry; and what single ones promise beyond that."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import compose
from compose.kernels.factors import stack
from compose.kernels.low_rank import Pair
from hub.errors import Conflict, NotFound, UsageError
from router.bench import Batch, Bench
from router.gating import Gating
from router.router import Router
from router.scorer import SCORERS, make_scorer

EXPERTS = {"a": "a", "b": "b", "d": "d"}
FEW_STEPS = {name: {"steps": 3} for name in ("phatgoose", "gate", "smear", "fuse")}
METHODS = sorted(SCORERS)
ALONE = [name for name in METHODS if not SCORERS.get(name).joint]


@pytest.fixture
def bench(model, attach):
    """Three experts, each with rows of its own part of the vocabulary."""
    attach(model, "d", "lora", 4, r=3, target_modules="all-linear")
    generator = torch.Generator().manual_seed(0)
    rows = {
        name: [torch.randint(3 + 19 * i, 3 + 19 * (i + 1), (9,), generator=generator) for _ in range(6)]
        for i, name in enumerate(EXPERTS)
    }
    return Bench(model, EXPERTS, rows, batch_size=4)


@pytest.fixture
def batch(bench):
    rows = [bench.rows[name][0][: 9 - 2 * i] for i, name in enumerate(("b", "d", "a"))]
    return Batch.of(rows, tasks=("b", "d", "a"))


def fit(method, bench, experts=EXPERTS, **more):
    chosen = replace(bench, experts={name: EXPERTS[name] for name in experts})
    return Router.fit(method, chosen, options=FEW_STEPS.get(method), **more)


def answers(router, bench, batch):
    """Logits of each row's own tokens."""
    with torch.no_grad(), router.routed(bench.model, batch):
        logits = bench.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return [row[kept.bool()] for row, kept in zip(logits, batch.attention_mask, strict=True)]


def close(left, right):
    return all(torch.allclose(x, y, atol=5e-5) for x, y in zip(left, right, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_scorer_keeps_its_promises(method, bench, batch):
    compose.activate(bench.model, "c")
    router = fit(method, bench)
    logits = answers(router, bench, batch)
    if method != "fuse":
        weights = router.weights(bench.model, batch)
        assert torch.allclose(weights.sum(-1), torch.ones(3, dtype=weights.dtype), atol=1e-5)
        tokens = router.token_weights(bench.model, batch)
        assert tokens.shape == (3, 9, 3) and bool((tokens >= 0).all())
    assert [str(row) for row in compose.runtime.model_runtime.runtime(bench.model).rows] == ["c"], (
        "what was active is active again"
    )

    turned = replace(router, experts=dict(reversed(router.experts.items())))
    assert close(answers(turned, bench, batch), logits), "the order of experts does not matter"
    for i in range(3):
        alone = Batch.of([batch.input_ids[i][batch.attention_mask[i].bool()]], tasks=batch.tasks[i : i + 1])
        assert close(answers(router, bench, alone), logits[i : i + 1]), "the other rows do not matter"

    one = fit(method, bench, ["b"])
    compose.activate(bench.model, "b")
    with torch.no_grad():
        single = bench.model(input_ids=batch.input_ids[:1]).logits
    assert close(answers(one, bench, replace(batch, tasks=("b",) * 3))[:1], single), "one expert is that expert"


@pytest.mark.parametrize("method", ALONE)
def test_members_come_and_go_one_by_one(method, bench, batch):
    gating = Gating(top_k=1)
    two, three = fit(method, bench, ["a", "b"], gating=gating), fit(method, bench, gating=gating)
    asked = replace(batch, tasks=("b", "b", "a"))
    assert all(
        torch.equal(x, y)
        for x, y in zip(answers(three.without("d"), bench, asked), answers(two, bench, asked), strict=True)
    ), "removing an adapter is never having had it"
    added = two.add("d", bench)
    assert added.statistics.keys() == three.statistics.keys()
    for name, known in three.statistics.items():
        assert all(torch.equal(known[key], value) for key, value in added.statistics[name].items())
    with pytest.raises(Conflict):
        three.add("d", bench)
    with pytest.raises(NotFound, match="no expert"):
        two.without("d")


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(ALONE)))
def test_what_is_learned_together_is_not_added_to(method, bench):
    with pytest.raises(UsageError, match="together"):
        fit(method, bench, ["a", "b"]).add("d", bench)


@pytest.mark.parametrize("method", [name for name in METHODS if SCORERS.get(name).needs_data])
def test_missing_text_is_named(method, bench):
    with pytest.raises(UsageError, match="no text for b"):
        fit(method, replace(bench, rows={"a": bench.rows["a"], "d": bench.rows["d"]}))


@pytest.mark.parametrize(
    ("method", "options"),
    [("centroid", {}), ("centroid", {"embed": "tokens"}), ("discriminant", {}), ("discriminant", {"layers": 1})],
)
def test_a_row_is_found_where_it_is_from(method, options, bench, batch):
    router = Router.fit(method, bench, options=options)
    assert router.weights(bench.model, batch).argmax(1).tolist() == [1, 2, 0]


@pytest.mark.parametrize("wide", [4096, 1])
def test_discriminant_is_fishers(wide, bench, batch, monkeypatch):
    """Against the covariance of all embeddings written out, formed or by the matrix inversion lemma."""
    from router.embed import hidden_means, layer_means
    from router.scorers import discriminant

    assert layer_means(bench.model, batch, 8).shape == (3, 3 * 32), "embeddings and two layers: there are no more"
    assert torch.equal(layer_means(bench.model, batch, 2)[:, :32], hidden_means(bench.model, batch))
    points = {n: torch.cat([layer_means(bench.model, b, 8) for b in bench.batches(n)]).double() for n in EXPERTS}
    means = torch.stack([p.mean(0) for p in points.values()])
    pooled = sum((p - p.mean(0)).T @ (p - p.mean(0)) for p in points.values()) / (3 * 6 - 3)
    S = 0.9 * pooled + 0.1 * pooled.diagonal().mean() * torch.eye(96, dtype=torch.float64)
    away = layer_means(bench.model, batch, 8).double()[:, None] - means  # (B, E, D)
    exact = -0.5 * torch.einsum("bed,df,bef->be", away, torch.linalg.inv(S), away)

    monkeypatch.setattr(discriminant, "_WIDE", wide if wide > 1 else 3 * 6)
    router = Router.fit("discriminant", bench)
    found = router.scorer.score(bench.model, batch, EXPERTS, router.statistics)
    assert torch.allclose(found.log_softmax(-1), exact.log_softmax(-1), atol=0.05, rtol=1e-3)


def test_discriminant_keeps_what_a_text_is_and_how_it_is_written(bench, monkeypatch):
    """Of more directions than are kept, the trace stays; and another base is told."""
    from router.scorers import discriminant

    monkeypatch.setattr(discriminant, "_RANK", 2)
    cut = Router.fit("discriminant", bench).statistics["a"]
    monkeypatch.undo()
    whole = Router.fit("discriminant", bench).statistics["a"]
    traces = [float(s["factor"].float().square().sum() + s["rest"]) for s in (cut, whole)]
    assert cut["factor"].shape == (2, 96) and traces[0] == pytest.approx(traces[1], rel=1e-3)
    narrow = Router.fit("discriminant", bench, options={"layers": 1})
    other = replace(narrow, scorer=make_scorer("discriminant"))
    with pytest.raises(UsageError, match="fitted on 32 numbers a row, the base gives 96"):
        other.weights(bench.model, Batch.of([bench.rows["a"][0]]))


def test_spans_are_weighed_by_themselves(bench):
    """A row of two halves from two places: each half gets its own expert, and a span of the whole row is the row."""
    router = Router.fit("centroid", bench, options={"embed": "tokens"}, gating=Gating(top_k=1))
    row = torch.cat([bench.rows["a"][0], bench.rows["d"][0]])
    batch = Batch.of([row, row.flip(0)])
    weights = router.span_weights(bench.model, batch, 9)
    assert weights.argmax(-1).tolist() == [[0] * 9 + [2] * 9, [2] * 9 + [0] * 9]
    router.activate_spans(bench.model, batch, 18)
    with torch.no_grad():
        whole = bench.model(input_ids=batch.input_ids).logits
        assert close(answers(router, bench, batch), whole)
        router.activate_spans(bench.model, batch, 9)
        spans = bench.model(input_ids=batch.input_ids).logits
        compose.activate(bench.model, "a")
        assert torch.allclose(spans[0, :9], bench.model(input_ids=batch.input_ids).logits[0, :9], atol=5e-5)
    assert not torch.allclose(spans, whole, atol=1e-3)
    for wrong in ("arrow", "phatgoose"):
        with pytest.raises(UsageError, match="spans are for methods that weigh rows"):
            fit(wrong, bench).activate_spans(bench.model, batch, 9)
    with pytest.raises(UsageError, match="span of 0"):
        router.span_weights(bench.model, batch, 0)


def test_likelihood_is_the_posterior_of_the_ensemble(bench, batch):
    from router import Ensemble

    score = Ensemble(bench.model, list(EXPERTS)).score(batch.input_ids, batch.attention_mask)
    assert torch.allclose(fit("likelihood", bench).weights(bench.model, batch), score.final, atol=1e-9)


def test_arrow_has_the_exact_singular_vector_and_a_member_without_effect_gets_nothing(bench, batch):
    router = fit("arrow", bench)
    path, vector = next(iter(router.statistics["a"].items()))
    adapter = compose.runtime.model_runtime.runtime(bench.model).adapter("a")
    whole = stack([Pair(adapter.at(path, "A").detach(), adapter.at(path, "B").detach(), adapter.config.scale)], [1.0])
    exact = torch.linalg.svd(whole.B @ whole.A).Vh[0]
    assert abs(float(vector @ exact)) == pytest.approx(1.0, abs=1e-5)

    idle = compose.create(bench.model, "lora", {"r": 2, "target_modules": "all-linear"}, name="e", seed=5)
    idle.freeze()
    grown = router.add("e", replace(bench, experts={**EXPERTS, "e": "e"}))
    assert not grown.statistics["e"]
    assert all(
        torch.equal(x, y) for x, y in zip(answers(grown, bench, batch), answers(router, bench, batch), strict=True)
    )


def test_arrow_says_which_kinds_have_no_direction(bench):
    with pytest.raises(UsageError, match="ia3 adapter 'c' changes no weight"):
        Router.fit("arrow", replace(bench, experts={"a": "a", "c": "c"}))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gate", {"per": "layer", "lr": 0.1}),
        ("gate", {"balance": 0.0}),
        ("smear", {"lr": 0.1}),
        ("fuse", {"lr": 0.01}),
    ],
)
def test_what_is_learned_beats_weighing_all_alike(method, options, bench):
    """On the very rows it was fitted on, the loss falls below that of uniform weights."""
    rows = Batch.of([row for name in EXPERTS for row in bench.rows[name]])
    router = Router.fit(method, bench, options={"steps": 40, **options})
    with torch.no_grad():
        compose.route(bench.model, list(EXPERTS), lambda path, x: torch.full((1, 1, 3), 1 / 3))
        alike = bench.loss(bench.model, rows, "a")
        with router.routed(bench.model, rows):
            learned = bench.loss(bench.model, rows, "a")
    assert float(learned) < float(alike) - 0.02


def test_phatgoose_opens_the_gate_of_an_expert_that_helps(bench):
    """The trained gate lowers the loss of its own text below that of the gate half open, where it started."""
    router = Router.fit("phatgoose", replace(bench, experts={"a": "a"}), options={"steps": 60, "lr": 0.02})
    vectors, rows = router.statistics["a"], Batch.of(list(bench.rows["a"]))
    losses = []
    for scale in (0.0, 1.0):
        gate = lambda path, x, scale=scale: torch.sigmoid(scale * x @ vectors[path])[..., None]  # noqa: E731
        compose.route(bench.model, ["a"], gate)
        with torch.no_grad():
            losses.append(float(bench.loss(bench.model, rows, "a")))
    assert losses[1] < losses[0] - 0.02


def test_gates_are_balanced(bench):
    """With the balance loss alone in charge, no expert is left without tokens."""
    loose, tight = (
        Router.fit("gate", bench, options={"steps": 30, "lr": 0.05, "balance": weight}) for weight in (0.0, 30.0)
    )
    rows = Batch.of([row for name in EXPERTS for row in bench.rows[name]])
    spread = [router.weights(bench.model, rows).mean(0).std() for router in (loose, tight)]
    assert float(spread[1]) < float(spread[0])


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        ("arow", {}, "unknown routing method 'arow'"),
        ("centroid", {"embedd": "tokens"}, "no option 'embedd'"),
        ("centroid", {"embed": "pictures"}, "option embed"),
        ("gate", {"steps": 0}, "option steps"),
    ],
)
def test_wrong_names_are_told(method, options, told):
    with pytest.raises(UsageError, match=told):
        make_scorer(method, options)


def test_pools_that_do_not_work_are_refused(bench):
    with pytest.raises(UsageError, match="at least one expert"):
        Router.fit("arrow", replace(bench, experts={}))
    with pytest.raises(UsageError, match="top_k is 4 for 3 experts"):
        fit("arrow", bench, gating=Gating(top_k=4))
    with pytest.raises(UsageError, match="at least one expert"):
        fit("arrow", bench, ["a"]).without("a")
    with pytest.raises(NotFound, match="no adapter 'zz'"):
        Router.fit("arrow", replace(bench, experts={"zz": "zz"}))
    broken = fit("arrow", bench)
    poisoned = {name: {k: v * float("nan") for k, v in known.items()} for name, known in broken.statistics.items()}
    batch = Batch.of([bench.rows["a"][0]])
    with pytest.raises(UsageError, match="NaN"):
        answers(replace(broken, statistics=poisoned), bench, batch)
