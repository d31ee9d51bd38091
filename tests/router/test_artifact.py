"""A router as an artifact, and the commands around it, on real adapters of the built-in base."""

from __future__ import annotations

import json
import shutil
import sys
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save

import compose
import router
from hub.errors import BaseMismatch, IntegrityError, NotFound, UsageError
from hub.manifest import Draft
from hub.pack import pack
from hub.store import Store
from router.artifact import load
from router.bench import Batch
from router.evaluation.similar import rank
from router.scorer import make_scorer

TINY = "builtin:tiny-lm"
TEXTS = {
    "law": ["The parties agree that the licence shall terminate on breach of any clause of this agreement."] * 6,
    "code": ["def add(a, b):\n    return a + b  # the sum of both numbers\n\nprint(add(1, 2))"] * 6,
}


def publish(store, folder, model, base, ref, seed, **facts):
    adapter = compose.create(model, "lora", {"r": 4, "target_modules": "all-linear"}, name=ref, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    compose.save(adapter.freeze(), folder, model=model, task="causal_lm")
    compose.detach(model, ref)
    name, _, version = ref.partition("@")
    facts = {"base": base, "task": "causal_lm", "license": "mit", "placement": tuple(adapter.paths), **facts}
    pack(folder, Draft(name=name, version=version, kind="lora", **facts))
    return store.put(folder)


@pytest.fixture(scope="module")
def stocked(tmp_path_factory):
    root = tmp_path_factory.mktemp("routers")
    model = compose.load(TINY, dtype="fp32")
    base, store = compose.identity(model), Store(root / "store")
    for seed, name in enumerate(("law", "code", "mail")):
        publish(store, root / name, model, base, f"ns/{name}@1.0.0", seed)
    other = base.model_copy(update={"tokenizer_digest": "sha256:" + "0" * 64})
    publish(store, root / "other", model, other, "ns/other@1.0.0", 7)
    for name, rows in TEXTS.items():
        lines = "\n".join(json.dumps({"text": row}) for row in rows)
        (root / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return root


@pytest.fixture
def place(stocked, tmp_path, monkeypatch):
    """A store of its own for each test, and the text files."""
    shutil.copytree(stocked / "store", tmp_path / "home")
    monkeypatch.setenv("HUB_HOME", str(tmp_path / "home"))
    for name in TEXTS:
        shutil.copy(stocked / f"{name}.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hub(*words, code=0):
    from hub.cli import main

    result = CliRunner().invoke(main, list(words), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def fit(method, *more, ref="ns/router@1.0.0", members=("ns/law", "ns/code"), code=0):
    return hub("route", "fit", *members, "--method", method, "-o", ref, *more, code=code)


DATA = ("--data", "law=law.jsonl", "--data", "code=code.jsonl")


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("arrow", ()),
        ("task", ()),
        ("likelihood", ("--temperature", "2")),
        ("centroid", DATA),
        ("discriminant", DATA),
        ("fuse", (*DATA, "--option", "steps=1")),
    ],
)
def test_a_router_that_was_published_weighs_as_before(method, more, place):
    found = json.loads(fit(method, *more, "--json").stdout)
    assert found["method"] == method and len(found["requires"]) == 2
    assert all(need["range"] == ">=1.0.0,<2" and need["digest"].startswith("sha256:") for need in found["requires"])
    stored = load("ns/router")
    assert list(stored.router.experts) == ["law", "code"]
    assert not Store().verify("ns/router")
    model = compose.load(TINY, dtype="fp32")
    stored.attach(model)
    tokens = torch.arange(100, 112)
    batch = Batch.of([tokens, tokens + 50], tasks=("code", "law"))
    with torch.no_grad(), stored.router.routed(model, batch):
        routed = model(input_ids=batch.input_ids).logits
    compose.activate(model, None)
    assert not torch.allclose(routed, model(input_ids=batch.input_ids).logits, atol=1e-3)


def test_add_measures_the_new_one_alone_and_keeps_ranges(place):
    fit("centroid", *DATA, members=("ns/law>=1,<1.5", "code=ns/code"))
    before = load("ns/router@1.0.0")
    (place / "mail.jsonl").write_text('{"text": "Dear Ann, thank you for your letter of Monday."}\n', encoding="utf-8")
    hub("route", "add", "ns/router", "ns/mail", "--data", "mail=mail.jsonl", "-o", "ns/router@1.1.0")
    after = load("ns/router@1.1.0")
    assert list(after.router.experts) == ["law", "code", "mail"]
    for name, known in before.router.statistics.items():
        assert all(torch.equal(value, after.router.statistics[name][key]) for key, value in known.items())
    assert {need.name: need.range for need in after.manifest.requires}["ns/law"] == ">=1,<1.5"
    gone = after.router.without("mail")
    assert gone.statistics.keys() == before.router.statistics.keys()

    told = hub("route", "add", "ns/router", "ns/code", "-o", "ns/router@1.2.0", code=1)
    assert "has a member 'code' already" in told.stderr
    fit("gate", *DATA, "--option", "steps=1", ref="ns/gate@1.0.0")
    assert "together" in hub("route", "add", "ns/gate", "ns/mail", "-o", "ns/gate@1.1.0", code=2).stderr


def test_what_cannot_be_a_router_leaves_nothing_behind(place):
    for words, code, told in [
        (fit_words("arow"), 2, "did you mean arrow"),
        (fit_words("centroid"), 2, "no text for law, code"),
        (fit_words("centroid", "--data", "lax=law.jsonl"), 1, "did you mean law"),
        (fit_words("arrow", "--top-k", "3"), 2, "top_k is 3 for 2 experts"),
        (fit_words("arrow", members=("ns/law", "ns/other")), 1, "different tokenizers"),
        (fit_words("arrow", members=("ns/law", "x=ns/law", "x=ns/code")), 2, "two members are called 'x'"),
        (fit_words("arrow", members=("ns/law", "ns/coda")), 1, "ns/coda"),
        (fit_words("arrow", ref="ns/router"), 2, "names no version"),
    ]:
        result = hub(*words, code=code)
        assert told in result.stderr, result.stderr
    assert not Store().list(name="ns/router")


def fit_words(method, *more, ref="ns/router@1.0.0", members=("ns/law", "ns/code")):
    return ("route", "fit", *members, "--method", method, "-o", ref, *more)


def test_members_that_are_gone_or_yanked_are_named(place, tmp_path, monkeypatch):
    fit("arrow")
    hub("yank", "ns/code@1.0.0", "--reason", "it was wrong")
    with pytest.raises(NotFound, match=r"ns/code@1\.0\.0 was yanked: it was wrong"):
        load("ns/router")
    artifact = Store().get("ns/router")
    bare = Store(tmp_path / "elsewhere")
    bare.put(artifact.materialize(tmp_path / "out"))
    with pytest.raises(NotFound, match=r"chooses among others ns/law@1\.0\.0"):
        load("ns/router", bare)
    with pytest.raises(UsageError, match="is of type adapter, no router"):
        load("ns/law")
    with pytest.raises(BaseMismatch):
        from compose.planning.members import AdapterFinder
        from router.artifact import members_of

        members_of(["ns/law", "ns/other"], AdapterFinder())


def test_files_that_make_no_router_are_refused(place, tmp_path):
    fit("centroid", *DATA)
    artifact = Store().get("ns/router")
    for number, (file, content, told) in enumerate(
        [
            ("router.json", '{"method": "centroid", "members": []}', "members"),
            ("router.json", '{"method": "centroid", "memmbers": 1}', "members|memmbers"),
            (
                "router.json",
                json.dumps({**json.loads(artifact.read("router.json")), "top_k": 3}),
                "keeps 3 of 2 members",
            ),
            ("router.safetensors", None, "lacks mean of 'law'"),
            (
                "router.safetensors",
                save({"0/mean": torch.ones(192), "1/mean": torch.ones(8)}),
                r"'code' is \(8,\), that of 'law'",
            ),
        ]
    ):
        out = artifact.materialize(tmp_path / f"out{number}")
        (out / file).unlink()
        if content is not None:
            (out / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        pack(out, artifact.manifest.draft().model_copy(update={"version": f"2.{number}"}))
        broken = Store().put(out)
        with pytest.raises(IntegrityError, match=told):
            load(broken.ref)


def test_eval_stands_beside_what_has_to_be_beaten(place):
    fit("likelihood")
    said = hub("route", "eval", "ns/router", *DATA, "--max-rows", "2", "--json", "-", "--plot", "c.svg")
    found = json.loads(said.stdout)
    ElementTree.parse(place / "c.svg")
    for row in found["rows"]:
        single = found["single"][row["set"]]
        assert row["oracle"] == pytest.approx(single[row["expert"]]) and row["expert"] == row["set"]
        assert row["demix"] <= min(single.values()) * 2 ** (1 / 8), "the regret bound: ln 2 over the text's tokens"
        assert row["prompt_tokens"] == 32 and row["items"] > 0
        assert sum(found["confusion"][row["set"]].values()) == pytest.approx(1.0)
        assert row["uniform"] > 0
    table = hub("route", "eval", "ns/router", *DATA, "--max-rows", "1").stdout
    assert "PERPLEXITY" in table and "MEAN WEIGHT" in table and "uniform" in table
    fit("task", ref="ns/task@1.0.0")
    given = json.loads(hub("route", "eval", "ns/task", *DATA, "--max-rows", "2", "--json", "-").stdout)
    for row in given["rows"]:
        assert row["routed"] == pytest.approx(row["oracle"], rel=1e-4), "the given task is the oracle"


def test_a_prior_is_fitted_on_rows_like_those_of_a_set(place):
    """Of texts that law explains best, the prior is law's; so the mixture starts where it would end, or close by."""
    fit("likelihood", "--option", "hedge=true", ref="ns/hedged@1.0.0")
    sets = ("--data", "novel=law.jsonl", "--max-rows", "2", "--prompt-tokens", "1", "--json", "-")
    plain, fitted = (
        json.loads(hub("route", "eval", "ns/hedged", *sets, *dev).stdout)["rows"][0]
        for dev in ((), ("--dev", "novel=law.jsonl"))
    )
    assert fitted["uniform"] == plain["uniform"] and fitted["demix"] < plain["demix"]
    assert fitted["routed"] == plain["routed"], "what is served starts from no rows' prior"
    assert plain["demix"] <= min(plain["uniform"], plain["oracle"] * 2 ** (1 / 8)) * 5 ** (1 / 8), "ln 5 nats a text"
    told = hub("route", "eval", "ns/hedged", *sets, "--dev", "nvel=law.jsonl", code=2).stderr
    assert "--data none" in told and "did you mean novel" in told
    fit("arrow")
    assert "has no prior" in hub("route", "eval", "ns/router", *sets, "--dev", "novel=law.jsonl", code=2).stderr
    hot = fit("likelihood", "--option", "hedge=true", "--temperature", "2", ref="ns/hot@1.0.0", code=2)
    assert "choose their own pace" in hot.stderr
    with pytest.raises(UsageError, match="choose their own"):
        make_scorer("likelihood", {"hedge": True, "gamma": 0.5})


def test_explain_colours_every_token(place):
    fit("arrow")
    options = ("--text", "def answer(): return 42", "--html", "page.html", "--svg", "map.svg")
    found = json.loads(hub("route", "explain", "ns/router", *options, "--json").stdout)
    assert "".join(token["token"] for token in found["tokens"]) == "def answer(): return 42"
    assert all(sum(token["weights"].values()) == pytest.approx(1.0, abs=1e-4) for token in found["tokens"])
    ElementTree.parse(place / "map.svg")
    assert "<span" in (place / "page.html").read_text("utf-8")
    plain = hub("route", "explain", "ns/router", "--text", "def answer(): return 42").stdout
    assert "def answer(): return 42" in plain and "%" in plain
    fit("likelihood", ref="ns/like@1.0.0")
    posterior = json.loads(hub("route", "explain", "ns/like", "--text", "a b c d", "--json").stdout)["tokens"]
    assert posterior[0]["weights"] == pytest.approx({"law": 0.5, "code": 0.5}), "before the first token, the prior"


def test_like_ranks_by_words_alone(place):
    assert "no adapter of the store carries" in hub("route", "like", "law.jsonl", code=1).stderr
    fit("centroid", *DATA)
    assert rank("breach of this agreement and its licence")[0][0] == "ns/law@1.0.0"
    best, worst = json.loads(hub("route", "like", "code.jsonl", "--json").stdout)
    assert best["ref"] == "ns/code@1.0.0" and best["score"] > 0 > worst["score"]
    with pytest.raises(UsageError, match="no words"):
        rank("  ")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("[1]", "line 1 is no object"),
        ('{"label": "x"}', "line 1 has no text"),
        ("", "holds no text"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_bad_text_files_are_named_with_the_line(place, content, told):
    path = place / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert told in hub(*fit_words("centroid", "--data", "law=bad.jsonl", "--data", "code=code.jsonl"), code=1).stderr


def test_help_and_methods_do_not_load_models(place):
    import subprocess

    code = "import sys; from router.commands import route; from click.testing import CliRunner as R; "
    code += "assert R().invoke(route, ['--help']).exit_code == 0; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    listed = json.loads(hub("route", "methods", "--json").stdout)
    assert {row["method"] for row in listed} >= {"arrow", "centroid", "fuse", "gate", "likelihood", "phatgoose", "task"}
    assert "did you mean fit" in hub("route", "fti", code=2).stderr


def test_eval_of_classifiers_counts_the_names_of_classes(place, tmp_path):
    """Two experts with heads of their own: one says the right class of its rows, so the given task is the oracle."""
    model = compose.load(TINY, dtype="fp32", task="classification", labels=("no", "yes"))
    base, store = compose.identity(model), Store()
    for seed, name in enumerate(("first", "second")):
        options = {"r": 2, "target_modules": "all-linear", "modules_to_save": ("score",)}
        adapter = compose.create(model, "lora", options, name=name, seed=seed)
        with torch.no_grad():
            adapter.head("score").weight.normal_(generator=torch.Generator().manual_seed(seed))
        compose.save(adapter.freeze(), tmp_path / name, model=model, task="classification")
        facts = {"task": "classification", "labels": ("no", "yes"), "placement": tuple(adapter.paths), "base": base}
        pack(tmp_path / name, Draft(name=f"ns/{name}", version="1.0.0", kind="lora", **facts))
        store.put(tmp_path / name)
    tokenizer, said = compose.tokenizer(TINY), {}
    for name in ("first", "second"):
        compose.activate(model, name)
        rows = []
        for text in ("one small step", "a giant leap", "the eagle has landed"):
            with torch.no_grad():
                best = int(model(input_ids=torch.tensor([tokenizer(text).input_ids])).logits[0].argmax())
            rows.append({"text": text, "label": ("no", "yes")[best]})
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        said[name] = rows
    fit("task", members=("ns/first", "ns/second"))
    sets = ("--data", "first=first.jsonl", "--data", "second=second.jsonl")
    found = json.loads(hub("route", "eval", "ns/router", *sets, "--json", "-").stdout)
    assert found["metric"] == "accuracy"
    assert [row["routed"] for row in found["rows"]] == [1.0, 1.0] == [row["oracle"] for row in found["rows"]]
    agree = sum(a == b for a, b in zip(said["first"], said["second"], strict=True)) / 3
    assert found["single"]["first"]["second"] == pytest.approx(agree)
    assert found["confusion"]["second"] == {"first": 0.0, "second": 1.0}
    (tmp_path / "bare.jsonl").write_text('{"text": "no label"}', encoding="utf-8")
    assert "has no label" in hub("route", "eval", "ns/router", "--data", "first=bare.jsonl", code=2).stderr


def test_python_does_what_the_commands_do(place):
    files = {"law": "law.jsonl", "code": "code.jsonl"}
    made = router.fit(["ns/law", "ns/code"], "centroid", "ns/router@1.0.0", data={**files, "law": TEXTS["law"]})
    told = json.loads(fit("centroid", *DATA, "--json", ref="ns/same@1.0.0").stdout)
    assert (made.manifest.hyperparameters, made.manifest.method) == (
        {k: told[k] for k in ("options", "gating")},
        "centroid",
    )
    for name, known in load("ns/same").router.statistics.items():
        assert torch.equal(known["mean"], router.load("ns/router").router.statistics[name]["mean"])
    report = router.evaluate("ns/router", {"law": "law.jsonl"}, max_rows=2)
    said = hub("route", "eval", "ns/router", "--data", "law=law.jsonl", "--max-rows", "2", "--json", "-").stdout
    assert json.loads(said) == json.loads(json.dumps({"router": "ns/router", **report.as_dict()}))
    explained = router.explain("ns/router", "def answer(): return 42")
    said = hub("route", "explain", "ns/router", "--text", "def answer(): return 42", "--json").stdout
    rows = torch.tensor([list(token["weights"].values()) for token in json.loads(said)["tokens"]])
    assert torch.allclose(rows, explained.weights)
    assert set(explained.best) <= set(explained.experts) and "".join(explained.tokens) == "def answer(): return 42"
    assert router.rank("breach of this agreement")[0][0] == "ns/law@1.0.0"
    outcome = router.run("code.jsonl", "out.jsonl", base=TINY, adapter="ns/router", max_new_tokens=2)
    asked = ("run", "code.jsonl", "--base", TINY, "--router", "ns/router", "--max-new-tokens", "2")
    assert (outcome.rows, outcome.failed) == (6, 0) and (place / "out.jsonl").read_text() == hub(*asked).stdout
    grown = router.add("ns/router", "ns/mail", "ns/router@1.1.0", data={"mail": ["Dear Ann, thank you for it."]})
    assert list(router.load(grown.ref).router.experts) == ["law", "code", "mail"]
