"""The laws of merging, merges inside a model, and what is refused by name."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import compose
from compose import function
from compose.algebra import digest, parse
from compose.errors import CallError, KindError
from compose.expr.tree import Call, Ref
from compose.function import FUNCTIONS, functions
from compose.kind.registry import kinds
from compose.merging.fold import fold
from compose.merging.merge import lower_to_lora, merge
from compose.parameter_space.method import linear, methods
from compose.runtime.model_runtime import runtime
from hub.errors import HubError, UsageError

WEIGHTS = ("lora", "dora")  # kinds that add a matrix to a weight
VECTORS = ("ia3", "bias")
TENSORS = ("bottleneck", "prefix", "prompt")
Q = "model.layers.0.self_attn.q_proj"
MERGES = sorted(n for n, spec in functions().items() if spec.family == "merge")


def off(one: Tensor, other: Tensor) -> float:
    return float((one.detach() - other).norm() / other.norm())


# -- laws ----------------------------------------------------------------------------------------------------------

# Each merge of one adapter that gives that adapter back.
UNITS = (
    "average(a)",
    "task_arithmetic(a)",
    "cat(a)",
    "ties(a, density=1)",
    "ties(a, density=1, variant=peft)",
    "ties(a, density=1, variant=mergekit)",
    "dare(a, density=1)",
    "dare_ties(a, density=1)",
    "magnitude_prune(a, density=1)",
    "slerp(a, b, t=0)",
    "slerp(b, a, t=1)",
)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("kind", [*WEIGHTS, *VECTORS, *TENSORS])
def test_merges_of_one_adapter_are_that_adapter(lab: Any, kind: str, family: str) -> None:
    home = lab(family)
    home.add(kind, "a", "b")
    for text in UNITS:
        home.merge(text)
        assert home.apart("merged", "a") < 1e-5, text
        assert runtime(home.model).adapters["merged"].kind == kind


@pytest.mark.parametrize("kind", sorted(kinds()))
def test_every_kind_averages_or_says_why_not(lab: Any, kind: str) -> None:
    home = lab()
    home.add(kind, "a")
    try:
        home.merge("average(a)")
    except KindError as error:
        assert kind in str(error) and "average(a)" in str(error)
        assert kind not in (*WEIGHTS, *VECTORS, *TENSORS)
    else:
        assert home.apart("merged", "a") < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("kind", [*WEIGHTS, *VECTORS, *TENSORS])
def test_cat_is_the_sum(lab: Any, kind: str, family: str) -> None:
    home = lab(family)
    home.add(kind, "a")
    home.add(kind, "b", size=1)  # another rank, length or width
    made = home.merge("cat(a, b)")
    assert home.apart("merged", "a + b") < 1e-5
    assert made.certificate.exact and made.adapter.kind == kind


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_linear_merges_are_weighted_sums(lab: Any, family: str) -> None:
    home = lab(family)
    home.add("lora", "a", use_rslora=True)
    home.add("lora", "b", size=1, target_modules="all-linear")
    home.add("dora", "d")
    for text, same in {
        "svd(a, b)": "a + b",
        "svd(a, b, weights=[0.3, -2])": "0.3 * a - 2 * b",
        "cat(a, b, weights=[0.3, -2])": "0.3 * a - 2 * b",
        "task_arithmetic(a, b, lambda=0.4)": "0.4 * a + 0.4 * b",
        "average(a, b, weights=[1, 3])": "0.25 * a + 0.75 * b",
        "dare(a, b, density=1, rank=7)": "a + b",
        "magnitude_prune(a, b, density=1, weights=[1, 2], rank=7)": "a + 2 * b",
        'knots(a, b, by="linear", weights=[2, 0.5])': "2 * a + 0.5 * b",
        'knots(a, b, by="dare", density=1)': "a + b",
        "cat(a, d)": "a + d",  # a LoRA and a DoRA add up to a DoRA
        "average(d, a)": "0.5 * a + 0.5 * d",
        "0.5 * a - d": "0.5 * a - d",
    }.items():
        home.merge(text)
        assert home.apart("merged", same) < 1e-5, text


def test_an_average_needs_no_new_adapter_where_effects_are_linear(lab: Any) -> None:
    home = lab()
    home.add("lora", "a", "b")
    home.add("bottleneck", "c", "d")
    compose.activate(home.model, "average(a, b) >> cat(c, d)")
    assert set(runtime(home.model).adapters) == set("abcd")
    compose.activate(home.model, "average(c, d)")
    assert set(runtime(home.model).adapters) == {*"abcd", "average(c, d)"}


def test_lora_and_output_gains_merge_into_one_dora_without_biases(lab: Any) -> None:
    home = lab()
    home.add("lora", "a")
    home.add("ia3", "i", target_modules=("attn.q", "attn.v"), feedforward_modules=())
    assert home.merge("a + i").adapter.kind == "dora"
    assert home.apart("merged", "a + i") < 1e-5


@pytest.mark.parametrize("text", ["ties({}, rank=4)", "dare_ties({}, rank=4)", "dare({})", "svd({})", "average({})"])
def test_the_order_of_adapters_does_not_matter(lab: Any, text: str) -> None:
    home = lab()
    home.add("lora", "a", "b", "c")
    home.merge(text.format("a, b, c"), "one")
    home.merge(text.format("c, a, b"), "two")
    # The masks are seeded by content; what is left is the order of float sums, and the basis of a truncated SVD.
    assert off(home.delta("one"), home.delta("two")) < 1e-4
    assert digest(parse(text.format("a, b, c"))) == digest(parse(text.format("c, a, b")))


def test_members_may_act_at_different_sites(lab: Any) -> None:
    home = lab()
    home.add("ia3", "a", target_modules=("attn.k",))
    home.add("ia3", "b", target_modules=("mlp.down", "attn.v"))
    home.add("bias", "c", target_modules=("attn.q",))
    home.add("bias", "d", target_modules=("attn.q", "mlp.up"))
    for one, two in ("ab", "cd"):
        home.merge(f"cat({one}, {two}, weights=[2, 0.5])")
        assert home.apart("merged", f"2 * {one} + 0.5 * {two}") < 1e-5
        home.merge(f"ties({one}, {two}, density=1)")
        assert home.apart("merged", one) > 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merges_on_a_quantized_base(lab: Any, family: str) -> None:
    home = lab(family, "nf4")
    home.add("lora", "a")
    home.add("dora", "d")
    home.merge("cat(a, d, weights=[0.5, 1])")
    assert home.apart("merged", "0.5 * a + d") < 1e-4
    home.merge("ties(d, density=1)")
    assert home.apart("merged", "d") < 1e-4


def test_merged_adapters_are_saved_and_read_back(lab: Any, tmp_path: Any) -> None:
    home = lab()
    home.add("lora", "a", "b")
    home.merge("ties(a, b, density=0.5)")
    compose.save(runtime(home.model).adapters["merged"], tmp_path / "m", model=home.model)
    compose.attach(home.model, "again", tmp_path / "m")
    assert torch.equal(home.logits("again"), home.logits("merged"))


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abde"), st.floats(-2, 2).map(lambda w: round(w, 3))), min_size=1, max_size=6)
)
def test_any_weighted_sum_is_one_adapter(lab: Any, terms: list[tuple[str, float]]) -> None:
    home = lab(num_key_value_heads=4)
    home.add("lora", "a", use_rslora=True)
    home.add("lora", "b", size=1, target_modules="all-linear")
    home.add("dora", "d", "e", noise=0.1)
    text = " + ".join(f"{w} * {name}" for name, w in terms)
    made = home.merge(text)
    a, b, base = home.logits("merged"), home.logits(text), home.logits(None)
    assert float((a - b).norm()) < 1e-4 * float((b - base).norm()) + 1e-4 * float(base.norm())
    assert made.certificate.exact


# -- inside a model ------------------------------------------------------------------------------------------------


def test_a_merge_in_an_expression_is_made_once_and_anew_when_a_member_changes(lab: Any) -> None:
    home = lab()
    home.add("lora", "a", "b", "c")
    text = "ties(a, b, density=0.5)"
    home.merge(text)
    assert home.apart(f"0.5 * {text} + c", "0.5 * merged + c") < 1e-5
    made = runtime(home.model).adapters[text]
    home.logits([text, None])
    assert runtime(home.model).adapters[text] is made
    with torch.no_grad():
        runtime(home.model).adapters["a"].at(Q, "A").mul_(2)
    home.logits(text)
    assert runtime(home.model).adapters[text] is not made


def test_rows_of_a_batch_may_hold_different_merges(lab: Any) -> None:
    home = lab()
    home.add("lora", "a", "b")
    rows = ["dare(a, b)", "ties(a, b)"]
    together = home.logits(rows)
    alone = [home.tiny.logits(home.model, home.batch) for e in rows if compose.activate(home.model, e).exact]
    assert off(together[:7], alone[0][0]) < 1e-5 and off(together[7:], alone[1][1]) < 1e-5


def test_nested_merges_leave_nothing_behind(lab: Any) -> None:
    home = lab()
    home.add("lora", "a", "b", "c")
    home.merge("ties(dare(a, b), cat(b, c), density=1)")
    assert set(runtime(home.model).adapters) == {*"abc", "merged"}


def test_eject_restores_the_base_after_merges(lab: Any) -> None:
    home = lab()
    before = {k: v.clone() for k, v in home.model.state_dict().items()}
    home.add("dora", "a", "b")
    home.merge("ties(a, b)")
    home.logits("ties(a, b) + merged")
    compose.eject(home.model)
    after = home.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())


def test_progress_is_reported(lab: Any) -> None:
    home = lab()
    home.add("lora", "a", "b")
    seen: list[tuple[str, int, int]] = []
    merge(home.model, "ties(a, b)", progress=lambda *step: seen.append(step))
    assert [done for _, done, _ in seen] == [1, 2, 3, 4] and {total for *_, total in seen} == {4}


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ties(p, q)", "different configs"),
        ("ties(a, p)", "no parameters in common"),
        ("average(0.5 * p, p)", "no single adapter"),
        ("knots(i)", "works on low-rank deltas"),
        ("svd(i, rank=3)", "a rank is for low-rank deltas"),
        ("knots(a, d)", r"d changes model.* by more than a pair"),
        ("ties(a, c)", "moves the bias"),
        ("svd(a, p)", "no parameters in common"),
        ("cat(2 * p, q)", "there or not"),
        ("cat(p >> q)", "one adapter after the other"),
        ("identity", "no adapter in it"),
        ("ensemble.mean(a, b)", "cannot be activated"),
        ("cat(a, b, b, b, b, b)", "has only 16 dimensions"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(lab: Any, text: str, message: str) -> None:
    home = lab()
    home.add("lora", "a", "b")
    home.add("dora", "d")
    home.add("ia3", "i", target_modules=("mlp.down",))
    home.add("bias", "c", target_modules=("attn.q",))
    home.add("prefix", "p")
    home.add("prefix", "q", size=1)
    before = home.logits("a")
    with pytest.raises(KindError, match=message):
        merge(home.model, text)
    assert torch.equal(torch.cat(home.tiny.logits(home.model, home.batch)), before)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ties(a, b, weights=[1])", "2 adapters and 1 weights"),
        ("ties(a, b, weights=[1, -1])", "are positive"),
        ("ties(a, b, density=0)", "greater than 0"),
        ("dare(a, b, density=1.5)", "less than or equal to 1"),
        ("ties(a, b, variant=pape)", "'paper', 'peft' or 'mergekit'"),
        ("slerp(a, b, c)", "takes 2 adapters, not 3"),
        ("svd(a, b, rank=0)", "greater than or equal to 1"),
        ("knots(a, b, by=ties, weights=[1, -1])", "are positive"),
        ("ties(a, b, lamda=1)", "did you mean lambda"),
        ("dare(a, seed=-1)", "greater than or equal to 0"),
    ],
)
def test_options_are_checked_where_they_stand(text: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        parse(text)


def test_a_weight_inside_a_merge_is_refused(lab: Any) -> None:
    home = lab()
    home.add("lora", "a", "b")
    compose.activate(home.model, "average(a, b)", weights={"a": 0.5})  # a weighted sum: it means something
    with pytest.raises(KindError, match="stands inside ties"):
        compose.activate(home.model, "ties(a, b)", weights={"a": 0.5})


def test_a_weight_of_what_is_not_in_the_expression_is_refused(lab: Any) -> None:
    home = lab()
    home.add("lora", "a", "b")
    compose.activate(home.model, "a")
    before = home.logits("a")
    with pytest.raises(UsageError, match="'b', which is not in the expression"):
        compose.activate(home.model, "a", weights={"b": 0.5})
    assert torch.equal(torch.cat(home.tiny.logits(home.model, home.batch)), before)


def test_an_adapter_is_subtracted_as_the_hint_says(lab: Any) -> None:
    home = lab()
    home.add("lora", "a", "b", "c")
    with pytest.raises(HubError) as caught:
        parse("ties(a, c, weights=[1, -1])")
    expression = caught.value.hint.partition(": ")[2]
    assert expression == "ties(a, c) + -1 * b"
    compose.activate(home.model, expression)


def test_unknown_names_are_named(lab: Any) -> None:
    home = lab()
    home.add("lora", "alpha")
    for act in (merge, lower_to_lora, lambda m, e: list(fold(m, e))):
        with pytest.raises(Exception, match="did you mean alpha"):
            act(home.model, "ties(alpha, alpah)")


def test_gains_that_cancel_are_refused(lab: Any) -> None:
    home = lab()
    home.add("dora", "d", target_modules=("attn.q",))
    adapter = runtime(home.model).adapters["d"]
    with torch.no_grad():
        adapter.at(Q, "magnitude")[3] = 0
    with pytest.raises(KindError, match="zero in 1 rows"):
        merge(home.model, "average(d)")


def test_every_merge_is_declared_and_carried_out() -> None:
    assert set(methods()) == set(MERGES)
    for name, method in methods().items():
        assert method.paper.startswith(("arXiv:", "doi:")) and method.name == name
        assert digest(Call(name, [Ref("a"), Ref("b")])) == digest(Call(name, [Ref("a"), Ref("b")]))


def test_what_merges_declare_is_read_without_torch() -> None:
    code = (
        "import sys; from compose.function import MERGES; from compose.algebra import parse\n"
        "print([parse(f'{name}(a, b)').function for name in MERGES] and sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_merge_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def add(name: str) -> None:
        linear(name, "Nothing.", paper="")(lambda o, n: [0.0] * n)

    monkeypatch.setattr(FUNCTIONS, "_known", dict(FUNCTIONS.all()))
    monkeypatch.setattr(function.MERGES, "_known", dict(function.MERGES.all()))
    for taken, where in {"ties": "compose.merges.ties", "at": "compose.function"}.items():
        with pytest.raises(CallError, match=f"{taken!r} is registered twice: {where} and {__name__}"):
            add(taken)
    add("nothing")
    assert parse("nothing(a, b)").function in methods()
