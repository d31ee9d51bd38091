"""The expression tree: round trips, laws of the normal form, and hostile text."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from compose.algebra import digest, from_json, normalize, parse, to_json
from compose.errors import CallError, ExpressionError
from compose.expr import tree as ex
from compose.expr.tree import IDENTITY, Add, Call, Ref, Scale, Seq, add, seq
from compose.function import FUNCTIONS, FunctionSpec, Options, bind, functions, get_function, register

# -- random trees --------------------------------------------------------------------------------------------------

names = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,8}[a-z0-9])?", fullmatch=True)
versions = st.sampled_from(["1.2.0", "2.0rc1", "prod", "sha256:" + "ab" * 32])
ref_texts = st.one_of(
    names,
    st.builds("{}/{}".format, names, names),
    st.builds("{}/{}@{}".format, names, names, versions),
    st.builds("{}/{}>=1,<2".format, names, names),
    st.sampled_from(
        ["identity", "2", "1e5", ".5", "-x", "a - b", 'with "quotes"', "back\\slash", "ünï", "true", "a.b"]
    ),
)
refs = st.builds(Ref, ref_texts)
factors = st.floats(-1e6, 1e6, allow_nan=False).map(lambda c: c + 0.0)


def _calls(children: st.SearchStrategy[ex.Expr]) -> st.SearchStrategy[ex.Expr]:
    args = st.lists(children, min_size=1, max_size=3)
    weighted = args.flatmap(
        lambda a: st.builds(
            lambda w: Call("average", a, {"weights": w}),
            st.lists(st.floats(0.0625, 8), min_size=len(a), max_size=len(a)),
        )
    )
    mixed = st.builds(
        lambda a, p, g: Call("ensemble.demix", a, {"prior": p, "gamma": g}),
        args,
        st.sampled_from(["uniform", "cached"]),
        st.floats(0, 1),
    )
    return st.one_of(args.map(lambda a: Call("average", a)), weighted, mixed)


def _grow(children: st.SearchStrategy[ex.Expr]) -> st.SearchStrategy[ex.Expr]:
    return st.one_of(
        st.builds(Scale, factors, children),
        st.lists(children, min_size=2, max_size=4).map(lambda parts: add(*parts)),
        st.lists(children, min_size=2, max_size=4).map(lambda parts: seq(*parts)),
        _calls(children),
    )


trees = st.recursive(st.one_of(refs, st.just(IDENTITY)), _grow, max_leaves=12)


@settings(max_examples=60)
@given(trees)
def test_text_round_trip(tree: ex.Expr) -> None:
    assert parse(str(tree)) == tree


@settings(max_examples=60)
@given(trees)
def test_json_and_yaml_round_trip(tree: ex.Expr) -> None:
    value = to_json(tree)
    assert from_json(json.loads(json.dumps(value))) == tree
    assert from_json(yaml.safe_load(yaml.safe_dump(value))) == tree


@given(trees)
def test_equal_trees_hash_alike_and_work_as_keys(tree: ex.Expr) -> None:
    twin = from_json(to_json(tree))
    assert hash(twin) == hash(tree)
    assert {tree: 1}[twin] == 1


@given(trees)
def test_normal_form_is_a_fixed_point(tree: ex.Expr) -> None:
    once = normalize(tree)
    assert normalize(once) == once
    assert digest(once) == digest(tree)


@settings(max_examples=40)
@given(trees, trees, trees, factors)
def test_laws_of_the_algebra_hold_for_digests(a: ex.Expr, b: ex.Expr, c: ex.Expr, factor: float) -> None:
    assert digest(a + b) == digest(b + a)
    assert digest((a + b) + c) == digest(a + (b + c))
    assert digest((a >> b) >> c) == digest(a >> (b >> c))
    assert digest(0 * a) == digest(IDENTITY)
    assert digest(1 * a) == digest(a)
    assert digest(a - a) == digest(IDENTITY)
    assert digest(a + IDENTITY) == digest(a >> IDENTITY) == digest(IDENTITY >> a) == digest(a)
    assert digest(factor * (a + b)) == digest(factor * a + factor * b)
    assert digest(0.5 * (0.25 * a)) == digest(0.125 * a)
    assert digest(a + a) == digest(2 * a)


@given(st.lists(factors, min_size=2, max_size=6), st.randoms())
def test_factors_add_exactly_in_any_order(values: list[float], random: object) -> None:
    terms = [Scale(value, Ref("a")) for value in values]
    shuffled = list(terms)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert normalize(add(*terms)) == normalize(add(*shuffled))
    assert normalize(add(*terms)) == normalize(Scale(math.fsum(values), Ref("a")))


def test_order_matters_where_it_should() -> None:
    assert digest(parse("a >> b")) != digest(parse("b >> a"))
    assert digest(parse("2 * (a >> b)")) != digest(parse("(2 * a) >> (2 * b)"))
    assert digest(parse("2 * (a >> b)")) != digest(parse("2 * a >> b"))
    assert digest(parse("ensemble.demix(a, b, prior=[.9, .1])")) != digest(
        parse("ensemble.demix(b, a, prior=[.9, .1])")
    )


# -- the grammar ---------------------------------------------------------------------------------------------------

a, b, c = Ref("a"), Ref("b"), Ref("c")


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("a", a),
        ("ns/a@1.2.0", Ref("ns/a@1.2.0")),
        ("ns/a@2.0rc1 + ns/b@prod", Add((Ref("ns/a@2.0rc1"), Ref("ns/b@prod")))),
        (f"ns/a@sha256:{'0' * 64}", Ref(f"ns/a@sha256:{'0' * 64}")),
        ('"ns/a>=1,<2"', Ref("ns/a>=1,<2")),
        ("'ns/a>=1,<2' + b", Add((Ref("ns/a>=1,<2"), b))),
        ("a + b >> c", Seq((Add((a, b)), c))),
        ("a + (b >> c)", Add((a, Seq((b, c))))),
        ("0.5 * a + b >> ns/c@1.2.0", Seq((Add((Scale(0.5, a), b)), Ref("ns/c@1.2.0")))),
        ("a*0.5", Scale(0.5, a)),
        ("2 * 3 * a", Scale(6, a)),
        ("2 * (3 * a)", Scale(2, Scale(3, a))),
        ("-a", Scale(-1, a)),
        ("-2*a", Scale(-2, a)),
        ("a - b", Add((a, Scale(-1, b)))),
        ("a - 0.5*b - c", Add((a, Scale(-0.5, b), Scale(-1, c)))),
        ("a-b", Ref("a-b")),
        ("1e-3 * a", Scale(0.001, a)),
        (".3*a", Scale(0.3, a)),
        ("+a", a),
        ("identity", IDENTITY),
        ('"identity"', Ref("identity")),
        ("average(a)", Call("average", (a,))),
        ("average(a, b, weights=[.3, .7])", Call("average", (a, b), {"weights": (0.3, 0.7)})),
        ("ensemble.mean(a + b, c)", Call("ensemble.mean", (Add((a, b)), c))),
        ("ensemble.demix(a, prior=cached)", Call("ensemble.demix", (a,), {"prior": "cached"})),
        ("a + # the first\n  b", Add((a, b))),
        ("(((a)))", a),
        ("if + lambda", Add((Ref("if"), Ref("lambda")))),
        ("3b-model@1.0.0", Ref("3b-model@1.0.0")),
    ],
)
def test_text_means_tree(text: str, tree: ex.Expr) -> None:
    assert parse(text) == tree


def test_python_operators_build_what_text_says() -> None:
    assert 0.5 * a + b >> c == parse("0.5 * a + b >> c")
    assert a - b * 0.5 == parse("a - b * 0.5")
    assert -(2 * a) == parse("-(2 * a)")
    assert sum([a, b, c]) == parse("a + b + c")
    assert add() == seq() == IDENTITY
    assert add(a) == seq(a) == a
    with pytest.raises(TypeError):
        a + 2  # type: ignore[operator]
    with pytest.raises(TypeError):
        a * b  # type: ignore[operator]


def test_trees_are_frozen() -> None:
    with pytest.raises(AttributeError):
        a.text = "b"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "says", "under"),
    [
        ("averag(a)", "did you mean average", "averag"),
        ("a + averag(b)", "unknown function", "averag"),
        ("average(a, weight=[1])", "did you mean weights", "weight=[1]"),
        ("average(a, b, weights=[1])", "2 adapters and 1 weights", "weights=[1]"),
        ("average(a, b, weights=[1, -1])", "not negative", "weights=[1, -1]"),
        ("average(a, weights=[x])", "valid number", "weights=[x]"),
        ("average(a, weights=[1], weights=[1])", "given twice", "weights=[1]"),
        ("average()", "at least 1 adapter", "average"),
        ("average(2)", "adapters, not numbers", "2"),
        ("ensemble.demix(a, gamma=2)", "less than or equal to 1", "gamma=2"),
        ("ensemble.demix(a, gamma=0.9, hedge=true)", "choose their own pace", "hedge=true"),
        ("ensemble.demix(a, prior=unform)", "none of uniform", "prior=unform"),
        ("a +", "something is missing", ""),
        ("a b", "does not fit here", "b"),
        ("a * b", "multiplied by a number", "b"),
        ("a + 2", "number", "2"),
        ("2", "no composition", "2"),
        ("1e999 * a", "too large", "1e999"),
        ("a / 2", "no meaning", "/"),
        ("ns/a>=1 + b", "no meaning", ">"),
        ("(a", "does not fit", "("),
        ("a)", "does not fit", ")"),
        ("[a]", "value of an option", "[a]"),
        ("a[b]", "not part of an expression", "a[b]"),
        ("f(*a)", "not part of an expression", "*a"),
        ("(a, b)", "value of an option", "(a, b)"),
        ("2(a)", "only a named function", "2"),
        ("'open", "never closed", "'open"),
        ("a\n+ b\n+ 7\n+ c", "number", "7"),
        ("a; b", "no meaning", ";"),
        ("a.b(c)", "unknown function", "a.b"),
        ("__import__('os')", "unknown function", "__import__"),
        ("a if b else c", "does not fit", "if"),
    ],
)
def test_errors_point_at_the_place(text: str, says: str, under: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        parse(text)
    message, line, carets = caught.value.message.split("\n")
    assert says in message
    start = carets.index("^")
    assert line[start : start + carets.count("^")] == under


def test_a_long_line_is_shown_around_the_place() -> None:
    text = " + ".join(f"ns/expert-{i}@1.0.0" for i in range(100)) + " + nope("
    with pytest.raises(ExpressionError) as caught:
        parse(text)
    _, line, carets = caught.value.message.split("\n")
    assert len(line) < 100
    assert line[carets.index("^")] == "("


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   # only a comment",
        "(" * 10_000 + "a" + ")" * 10_000,
        "-" * 10_000 + "a",
        "average(" * 5_000 + "a" + ")" * 5_000,
        "+".join(["a"] * 10_000),
        " >> ".join(["a"] * 10_000),
        "*".join(["2"] * 9_000) + "*a",
        "a" * 1_000_000,
        '"' + "a" * 100_000 + '"',
        "1" * 100_000 + "*a",
        "[" * 500,
        "average(a, weights=" + "[" * 200 + "]" * 200 + ")",
        "average(a, weights=[" + ",".join(["1"] * 5_000) + "])",
        "0." + "0" * 50_000 + "*",
        "\ud800",
    ],
    ids=range(16),
)
def test_hostile_text_is_refused_clearly(text: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        parse(text)
    assert len(str(caught.value)) < 1_000


@settings(max_examples=300)
@given(st.text(alphabet="ab0.1e+-*>()[],=\"'/@# \n<", max_size=40))
def test_any_text_gives_a_tree_or_an_expression_error(text: str) -> None:
    try:
        tree = parse(text)
    except ExpressionError:
        return
    assert parse(str(tree)) == tree


def test_an_expression_error_survives_a_deep_call_stack() -> None:
    def deep(n: int) -> ex.Expr:
        return deep(n - 1) if n else parse(" + ".join(["a"] * 900))

    try:
        tree = deep(sys.getrecursionlimit() - 250)
    except ExpressionError as error:
        assert "nested too deeply" in str(error)
    else:
        assert tree.size == 901


# -- limits and values of trees ------------------------------------------------------------------------------------


def test_ten_thousand_nodes_are_refused_however_they_are_made() -> None:
    with pytest.raises(ExpressionError, match="too large"):
        Add([a] * 10_000)
    tree = a
    with pytest.raises(ExpressionError, match="too large"):
        for _ in range(20):
            tree = Seq((tree, tree)) + tree
    with pytest.raises(ExpressionError, match="too many"):
        from_json({"add": ["a"] * 10_000})


def test_depth_is_capped_without_recursion_errors() -> None:
    tree: ex.Expr = a
    with pytest.raises(ExpressionError, match="too deep"):
        for _ in range(100_000):
            tree = Scale(0.5, tree)
    nested: object = "a"
    for _ in range(5_000):
        nested = {"scale": 1, "of": nested}
    with pytest.raises(ExpressionError, match="nested deeper"):
        from_json(nested)


def test_a_thousand_experts_fit() -> None:
    tree = add(*(Scale(0.001, Ref(f"ns/e{i}@1.0.0")) for i in range(999)))
    assert parse(str(tree)) == tree
    assert len(tree.refs) == 999


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 10**400, True, "1", None])
def test_weights_are_finite_numbers(bad: object) -> None:
    with pytest.raises(ExpressionError):
        Scale(bad, a)  # type: ignore[arg-type]
    with pytest.raises(ExpressionError):
        from_json({"scale": bad, "of": "a"})


def test_factors_that_overflow_together_are_refused() -> None:
    with pytest.raises(ExpressionError, match="more than a float"):
        normalize(Scale(1e200, Scale(1e200, a)))
    assert normalize(Scale(1e-200, Scale(1e-200, a))) == IDENTITY


@pytest.mark.parametrize("bad", ["", " a", "a\n", "x" * 513, "\ud800", 3])
def test_ref_texts_are_printable(bad: object) -> None:
    with pytest.raises(ExpressionError):
        Ref(bad)  # type: ignore[arg-type]


def test_sums_of_one_and_sequences_of_one_are_not_trees() -> None:
    with pytest.raises(ExpressionError):
        Add((a,))
    with pytest.raises(ExpressionError):
        Seq((a,))
    with pytest.raises(ExpressionError):
        Add(("a", "b"))  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.inf, 2**60, {"x": 1}, "\ud800", [[[[[1]]]]]])
def test_option_values_have_a_json_form(bad: object) -> None:
    with pytest.raises(ExpressionError):
        Call("average", (a,), {"weights": bad})


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (3, r"\$"),
        ({"add": ["a", {"scale": "x", "of": "b"}]}, r"\$\.add\[1\]\.scale"),
        ({"add": ["a"]}, r"\$\.add"),
        ({"sum": []}, r"\$: keys sum"),
        ({"seq": "ab"}, r"\$\.seq: str"),
        ({"call": "averag", "args": ["a"]}, r"\$\.call: unknown function"),
        ({"call": "average", "args": ["a"], "options": [1]}, r"\$\.options"),
        ({"scale": 1, "of": ""}, r"\$\.of"),
    ],
)
def test_recipe_errors_name_the_place(value: object, place: str) -> None:
    with pytest.raises(ExpressionError, match=place):
        from_json(value)


# -- functions -----------------------------------------------------------------------------------------------------


def test_average_does_not_depend_on_order_or_on_the_scale_of_weights() -> None:
    assert digest(parse("average(a, b)")) == digest(parse("average(b, a)"))
    assert digest(parse("average(a, b, weights=[1, 3])")) == digest(parse("average(b, a, weights=[.75, .25])"))
    assert digest(parse("average(a, b, weights=[2, 2])")) == digest(parse("average(a, b)"))
    assert digest(parse("average(a, b, weights=[1, 0])")) == digest(a)
    assert digest(parse("average(a)")) == digest(parse("average(a, a)")) == digest(a)
    assert digest(parse("average(a, b, weights=[1, 3])")) != digest(parse("average(a, b)"))


@pytest.mark.parametrize("name", functions())
def test_every_function_is_usable_from_its_registration(name: str) -> None:
    spec = get_function(name)
    args = [Ref(f"x{i}") for i in range(min(max(2, spec.minimum), spec.maximum or 2))]
    call = Call(name, args)
    assert bind(call) == spec.options()
    assert parse(str(call)) == call == from_json(to_json(call))
    assert normalize(normalize(call)) == normalize(call)
    assert spec.summary.endswith(".")
    assert all(f.description for f in spec.options.model_fields.values())
    with pytest.raises(CallError, match="has no option"):
        bind(Call(name, args, {"no_such_option": 1}))


def test_a_new_function_needs_no_edit_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    class LerpOptions(Options):
        t: float = 0.5

    monkeypatch.setattr(FUNCTIONS, "_known", dict(functions()))
    register(FunctionSpec("lerp", "merge", "Between two.", LerpOptions, minimum=2, maximum=2))
    assert parse("lerp(a, b, t=0.25)") == Call("lerp", (a, b), {"t": 0.25})
    with pytest.raises(ExpressionError, match="takes 2 adapters, not 1"):
        parse("lerp(a)")
    with pytest.raises(CallError, match="registered twice"):
        register(FunctionSpec("lerp", "merge", "Another."))


def test_expressions_need_no_torch() -> None:
    code = (
        "import sys; from compose.algebra import digest, parse; import compose.planning.plan\n"
        "import compose.base.location, compose.base.fingerprint\n"
        "digest(parse('average(a, b) + c'))\n"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
