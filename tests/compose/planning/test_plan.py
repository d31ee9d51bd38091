"""Plans: what is refused before a tensor moves, what is shared, and what may be freed when."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compose.algebra import digest, normalize, parse
from compose.base.compatibility import rung
from compose.errors import CompositionCycle, ExpressionError, PlanError
from compose.expr.tree import IDENTITY, Expr, Ref, Scale, add, seq
from compose.planning.plan import Leaf, plan
from compose.planning.unfold import Resolved
from hub.errors import BaseMismatch, NotFound
from hub.manifest import BaseIdentity, Manifest, Requirement, weights_fingerprint

DIGEST = "sha256:" + "0" * 64


def base(repo: str = "org/base", *, arch: str = "a", **weights: str) -> BaseIdentity:
    named = {name: value * 16 for name, value in (weights or {"w": "1"}).items()}
    return BaseIdentity(
        repo=repo,
        arch_digest="sha256:" + arch * 64,
        weights_fingerprint=weights_fingerprint(named),
        weights=named,
        config_digest=DIGEST,
        vocab_size=8,
    )


def manifest(name: str, **facts: Any) -> Manifest:
    facts = {"kind": "lora", "version": "1.0.0", **facts}
    return Manifest(name=name, tensors_digest=DIGEST, created=datetime(2026, 1, 1, tzinfo=timezone.utc), **facts)


def among(leaves: Mapping[str, Resolved]) -> Callable[[str], Resolved]:
    def resolve(text: str) -> Resolved:
        if text not in leaves:
            raise NotFound(f"no adapter {text}", ref=text)
        return leaves[text]

    return resolve


LEAVES: dict[str, Resolved] = {
    "a": Leaf("lora", placement=("0.q", "1.q")),
    "b": Leaf("lora", placement=("1.q",)),
    "c": Leaf("ia3", placement=("0.k",)),
    "d": Leaf("bottleneck"),
}


def test_steps_are_in_order_and_shared() -> None:
    made = plan(parse("0.5 * average(a, b) + 0.2 * average(b, a) + 2 * a >> c"), among(LEAVES))
    assert [(s.operation, str(s.expr)) for s in made.steps] == [
        ("load", "a"),
        ("scale", "2 * a"),
        ("load", "b"),
        ("merge", "average(a, b)"),
        ("scale", "0.7 * average(a, b)"),
        ("add", "2 * a + 0.7 * average(a, b)"),
        ("load", "c"),
        ("seq", "2 * a + 0.7 * average(a, b) >> c"),
        ("inject", "2 * a + 0.7 * average(a, b) >> c"),
    ]
    assert made.steps[3].kind == "lora"
    assert made.steps[7].kind is None
    assert made.sites == {"0.k": ("c",), "0.q": ("a",), "1.q": ("a", "b")}
    assert made.digest == digest(made.expression)
    assert "merge average(a, b) [lora] <- 0, 2  (frees 0, 2)" in str(made)


def test_identity_is_planned_as_nothing() -> None:
    made = plan(IDENTITY, among({}))
    assert made.leaves == {}
    assert made.base is None
    assert made.steps[-1].operation == "inject"


trees = st.recursive(
    st.sampled_from("abcd").map(Ref),
    lambda inner: st.one_of(
        st.builds(Scale, st.sampled_from([0.0, -1.0, 0.5, 2.0]), inner),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: add(*parts)),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: seq(*parts)),
    ),
    max_leaves=10,
)


@settings(max_examples=60)
@given(trees)
def test_lifetimes_are_sound_and_tight(tree: Expr) -> None:
    made = plan(tree, among(LEAVES))
    held: set[int] = set()
    most = 0
    for step in made.steps:
        assert set(step.inputs) <= held  # nothing is read before it is made or after it is freed
        held.add(step.index)
        most = max(most, len(held))
        assert set(step.frees) <= held
        held -= set(step.frees)
    assert held == {made.steps[-1].index}  # everything but the result was freed
    assert made.peak == most
    assert nx.is_directed_acyclic_graph(made.graph)
    assert nx.is_frozen(made.graph)
    assert made.expression == normalize(tree)
    assert set(made.leaves) == set(made.expression.refs)
    exprs = [step.expr for step in made.steps[:-1]]
    assert len(set(exprs)) == len(exprs)  # equal sub-expressions are computed once


def test_changes_of_weights_merge_whatever_their_kinds() -> None:
    assert plan(parse("average(a, c)"), among(LEAVES)).steps[-2].kind is None


def test_a_weight_of_zero_loads_nothing_but_is_still_checked() -> None:
    assert set(plan(parse("a + 0 * b"), among(LEAVES)).leaves) == {"a"}
    with pytest.raises(NotFound, match="nobody"):
        plan(parse("a + 0 * nobody"), among(LEAVES))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("average(a, d)", r"average\(a, d\) merges parameters of one kind, but a is lora and d is bottleneck"),
        ("b + average(a, average(d, d))", "a is lora and average.d, d. is bottleneck"),
        ("average(a + b, a)", r"merges the parameters of adapters, and a \+ b is none"),
        ("average(0.5 * a, b)", r"0\.5 \* a is none"),
        ("a + ensemble.mean(a, b)", r"ensemble\.mean\(a, b\) mixes output probabilities, so it must be outermost"),
        ("2 * ensemble.mean(a, b)", "outermost"),
        ("ensemble.mean(ensemble.demix(a, b), c)", r"ensemble\.demix\(a, b\) mixes"),
    ],
)
def test_what_cannot_be_carried_out_names_its_node(text: str, says: str) -> None:
    with pytest.raises(PlanError, match=says) as caught:
        plan(parse(text), among(LEAVES))
    assert caught.value.hint


def test_ensembles_may_mix_expressions_of_any_kinds() -> None:
    made = plan(parse("ensemble.demix(a + c, b >> d, average(a, b))"), among(LEAVES))
    assert made.steps[-2].operation == "ensemble"


def test_unknown_functions_are_refused_also_in_trees_made_by_hand() -> None:
    from compose.expr.tree import Call

    with pytest.raises(ExpressionError, match="unknown function 'meld'"):
        plan(Call("meld", (Ref("a"),)), among(LEAVES))


# -- bases ---------------------------------------------------------------------------------------------------------


def test_adapters_of_different_bases_are_refused_naming_both() -> None:
    one, other = base("org/one", w="1", v="2"), base("org/other", w="1", v="3")
    leaves = {"ns/a": Leaf("lora", one), "ns/b": Leaf("lora", other), "free": Leaf("lora")}
    assert plan(parse("ns/a + free"), among(leaves)).base == one
    with pytest.raises(
        BaseMismatch, match=r"ns/a was made for org/one and ns/b for org/other.*1 tensors differ, v first"
    ):
        plan(parse("ns/a + free >> ns/b"), among(leaves))
    assert plan(parse("ns/a + ns/b"), among(leaves), allow_base_drift=True).base == one


def test_another_architecture_is_refused_even_when_drift_is_allowed() -> None:
    leaves = {"a": Leaf("lora", base(w="1")), "b": Leaf("lora", base(arch="b", w="2"))}
    with pytest.raises(BaseMismatch):
        plan(parse("a + b"), among(leaves), allow_base_drift=True)


def test_the_base_hook_sees_each_adapter_that_has_a_base() -> None:
    one = base()
    seen: list[tuple[str, BaseIdentity]] = []
    leaves = {"a": Leaf("lora", one), "b": Leaf("lora", one), "c": Leaf("lora")}
    plan(parse("a + b + 0 * b + c"), among(leaves), check_base=lambda *what: seen.append(what))
    assert seen == [("a", one), ("b", one)]

    def refuse(text: str, found: BaseIdentity) -> None:
        raise BaseMismatch(f"{text} does not fit {found.repo}")

    with pytest.raises(BaseMismatch, match="a does not fit org/base"):
        plan(parse("a"), among(leaves), check_base=refuse)


def test_a_tied_head_stored_twice_is_the_same_base() -> None:
    assert rung(base(emb="1", w="2"), base(emb="1", w="2", head="1")) == "exact"
    assert rung(base(emb="1", w="2"), base(emb="1", w="2", head="3")) == "drift"
    assert rung(base(emb="1"), base(emb="1"), trained="nf4", held="none") == "quantization"


# -- heads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True])
def test_heads_for_different_labels_conflict_side_by_side(trained: bool) -> None:
    def classifier(*labels: str) -> Leaf:
        config = {"modules_to_save": ("score",)}
        return Leaf("lora", labels=labels, hyperparameters={"adapter": config, "steps": 9} if trained else config)

    leaves = {"mood": classifier("good", "bad"), "topic": classifier("art", "war"), "mood2": classifier("good", "bad")}
    with pytest.raises(PlanError, match=r"mood and topic both bring their own 'score'.*good, bad and art, war"):
        plan(parse("0.5 * mood + topic"), among(leaves))
    with pytest.raises(PlanError, match="score"):
        plan(parse("average(mood, topic)"), among(leaves))
    assert len(plan(parse("average(mood, mood2)"), among(leaves)).leaves) == 2
    assert len(plan(parse("mood >> topic"), among(leaves)).leaves) == 2


# -- compositions --------------------------------------------------------------------------------------------------


def composition(name: str, text: str, **facts: Any) -> Manifest:
    return manifest(name, type="composition", expression=text, **facts)


def test_compositions_are_expanded_in_place() -> None:
    leaves = {
        "ns/a": manifest("ns/a"),
        "ns/b": manifest("ns/b"),
        "ns/both": composition("ns/both", "ns/a + ns/b"),
        "ns/more": composition("ns/more", "0.5 * ns/both >> ns/a"),
    }
    made = plan(parse("ns/more + ns/b"), among(leaves))
    assert made.expression == normalize(parse("(0.5 * (ns/a + ns/b) >> ns/a) + ns/b"))
    assert made.digest == digest(parse("(0.5 * (ns/a + ns/b) >> ns/a) + ns/b"))
    assert set(made.leaves) == {"ns/a", "ns/b"}


def test_what_a_composition_pins_by_digest_is_read_by_digest() -> None:
    member = manifest("ns/a")
    pin = Requirement(name="ns/a", range=">=1", digest=member.digest)
    leaves = {
        f"ns/a@{member.digest}": member,
        "ns/both": composition("ns/both", '"ns/a>=1" + 2 * x', requires=(pin,)),
        "x": Leaf("lora"),
    }
    assert set(plan(parse("ns/both"), among(leaves)).leaves) == {f"ns/a@{member.digest}", "x"}


def test_a_composition_that_contains_itself_is_refused() -> None:
    leaves = {
        "ns/x": composition("ns/x", "ns/y + a"),
        "ns/y": composition("ns/y", "ns/z"),
        "ns/z@prod": composition("ns/z", "2 * ns/x"),
        "ns/z": composition("ns/z", "2 * ns/x"),
        **LEAVES,
    }
    with pytest.raises(CompositionCycle, match=r"ns/x contains itself: ns/x -> ns/y -> ns/z -> ns/x"):
        plan(parse("a + ns/x"), among(leaves))
    with pytest.raises(CompositionCycle, match="ns/z contains itself: ns/z@prod -> ns/x -> ns/y -> ns/z"):
        plan(parse("ns/z@prod"), among(leaves))  # the same composition under another name


def test_compositions_that_grow_without_end_are_refused() -> None:
    leaves: dict[str, Resolved] = {"x0": Leaf("lora")}
    leaves |= {f"x{i}": composition(f"ns/x{i}", f"(x{i - 1} >> x{i - 1}) + x{i - 1}") for i in range(1, 30)}
    with pytest.raises(ExpressionError, match="too large"):
        plan(parse("x29"), among(leaves))
    chain: dict[str, Resolved] = {f"x{i}": composition(f"ns/x{i}", f"x{i + 1}") for i in range(100)}
    with pytest.raises(CompositionCycle, match="nested more than"):
        plan(parse("x0"), among(chain))


def test_errors_inside_a_composition_name_it() -> None:
    leaves = {"ns/bad": composition("ns/bad", "a + averag(b)"), "ns/kinds": composition("ns/kinds", "average(a, d)")}
    with pytest.raises(ExpressionError, match=r"in composition ns/bad: unknown function"):
        plan(parse("ns/bad"), among({**LEAVES, **leaves}))
    with pytest.raises(PlanError, match=r"average\(a, d\)"):
        plan(parse("ns/kinds"), among({**LEAVES, **leaves}))


def test_a_router_is_no_adapter() -> None:
    with pytest.raises(PlanError, match="ns/r is a router"):
        plan(parse("a + ns/r"), among({**LEAVES, "ns/r": manifest("ns/r", type="router")}))
