"""Members beside adapters of one task: heads for different labels, two names, the bare base; and the method `task`."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import router
from hub.cli import main
from hub.errors import IntegrityError, NotFound, UsageError
from hub.store import Store
from router.engine.engine import Engine
from router.engine.request import Request

BASE = "builtin:tiny-lm"
HEAD = {"hyperparameters": {"adapter": {"modules_to_save": ["score"]}}}  # as training publishes it
MOODS, TOPICS = ("bad", "good"), ("art", "sport", "war")


@pytest.fixture(scope="module")
def pool(published):
    """Two adapters that classify by heads of their own, beside those of the shared store."""
    published.publish("feel", seed=8, labels=MOODS, **HEAD)
    published.publish("theme", seed=9, labels=TOPICS, **HEAD)
    return published.store


@pytest.fixture
def place(pool, tmp_path, monkeypatch):
    monkeypatch.setenv("HUB_HOME", str(pool.root))
    monkeypatch.chdir(tmp_path)
    for name, labels, texts in (
        ("feel", MOODS, ["a dull and lifeless film", "I loved every minute of it", "never again, what a waste"]),
        ("theme", TOPICS, ["the match ended in a draw", "troops crossed the river", "a new gallery opens"]),
    ):
        rows = [{"text": text, "label": labels[i % len(labels)]} for i, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path


def hub(*words, code=0):
    result = CliRunner().invoke(main, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def test_members_have_heads_for_different_labels_from_fit_to_run(place):
    data = ("--data", "feel=feel.jsonl", "--data", "theme=theme.jsonl")
    hub("route", "fit", "feel", "theme", "--method", "discriminant", *data, "-o", "local/heads@1.0.0")
    report = json.loads(hub("route", "eval", "local/heads", *data, "--json", "-").stdout)
    assert report["metric"] == "accuracy" and report["confusion"]["feel"]["feel"] == 1.0
    rows = hub("run", "theme.jsonl", "--router", "local/heads").stdout.splitlines()
    assert {json.loads(row)["output"] for row in rows} <= set(TOPICS)


@pytest.fixture
def engine(pool):
    engine = Engine(BASE, store=pool, dtype="fp32", rows=4)
    yield engine
    engine.close()


def test_a_row_names_its_task(place, engine, jsonl):
    router.fit(["law", "code"], "task", "local/given@1.0.0")
    ask = [Request(text="To be", adapter="local/given", task=name, max_new_tokens=4) for name in ("code", "law")]
    alone = [Request(text="To be", adapter=name, max_new_tokens=4) for name in ("code", "law")]
    assert [a.text for a in engine.run(ask)] == [a.text for a in engine.run(alone)]
    with pytest.raises(UsageError, match="names none"):
        engine.run([Request(text="To be", adapter="local/given")])
    with pytest.raises(NotFound, match="'lax', which is no member") as told:
        engine.run([Request(text="To be", adapter="local/given", task="lax")])
    assert "law" in str(told.value.hint)
    for adapter in (None, "law"):
        with pytest.raises(UsageError, match="no router that is asked for a task"):
            engine.run([Request(text="To be", adapter=adapter, task="law")])
    path = jsonl([{"text": "To be", "tenant": name} for name in ("law", "code")])
    out = hub("run", path, "--router", "local/given", "--task-column", "tenant", "--max-new-tokens", 4).stdout
    assert [json.loads(row)["output"] for row in out.splitlines()] == [a.text for a in reversed(engine.run(alone))]
    bad = jsonl([{"text": "To be"}], name="bad.jsonl")
    assert "no column 'tenant'" in hub("run", bad, "--router", "local/given", "--task-column", "tenant", code=1).stderr


def test_two_names_for_one_adapter(place, engine):
    """Whatever the names share is the one adapter's: together they answer as it does."""
    router.fit(["law", "same=law", "code"], "likelihood", "local/twice@1.0.0", top_k=2)
    text = "The parties to this agreement"
    answer = engine.run([Request(text=text, adapter="local/twice", max_new_tokens=4)])[0]
    assert sum(answer.weights.values()) == pytest.approx(1.0) and len(answer.weights) <= 2
    router.fit(["law", "same=law"], "likelihood", "local/alone@1.0.0")
    answer = engine.run([Request(text=text, adapter="local/alone", max_new_tokens=4)])[0]
    assert answer.weights == {"local/law@1.0.0": pytest.approx(1.0)}
    assert answer.text == engine.run([Request(text=text, adapter="law", max_new_tokens=4)])[0].text
    router.fit(["law", "same=law"], "arrow", "local/sites@1.0.0")
    answer = engine.run([Request(text=text, adapter="local/sites", max_new_tokens=4)])[0]
    assert answer.text == engine.run([Request(text=text, adapter="law", max_new_tokens=4)])[0].text


def test_the_bare_base_is_a_member(place, engine):
    texts = {"law": ["The court held that the party"] * 3, "none": ["one two three four five six"] * 3}
    made = router.fit(["law", "none=identity"], "discriminant", "local/orelse@1.0.0", data=texts)
    assert [need.name for need in made.manifest.requires] == ["local/law"]
    asked = [Request(text=rows[0], adapter="local/orelse", max_new_tokens=4) for rows in texts.values()]
    alone = [
        Request(text=rows[0], adapter=name, max_new_tokens=4)
        for rows, name in zip(texts.values(), ("law", None), strict=True)
    ]
    answers = engine.run(asked)
    assert [a.text for a in answers] == [a.text for a in engine.run(alone)]
    assert [a.weights for a in answers] == [{"local/law@1.0.0": 1.0}, {"builtin:tiny-lm": 1.0}]
    report = router.evaluate("local/orelse", {"none": [router.Text(texts["none"][0])]})
    assert report.single["none"]["none"] == pytest.approx(report.rows[0]["base"], rel=1e-5)
    assert set(router.explain("local/orelse", texts["none"][0]).best) == {"none"}
    grown = router.add("local/orelse", "code", "local/orelse@1.1.0", data={"code": ["def main(argv):"] * 3})
    assert list(router.load(grown.ref).router.experts) == ["law", "none", "code"]
    router.fit(["law", "none=identity"], "likelihood", "local/half@1.0.0", temperature=1e6)
    half = engine.run([Request(text="To be", adapter="local/half", max_new_tokens=4)])[0]
    share = half.weights["local/law@1.0.0"]
    assert share == pytest.approx(0.5, abs=1e-3)
    assert half.text == engine.run([Request(text="To be", adapter=f"{share} * law", max_new_tokens=4)])[0].text


@pytest.mark.parametrize(
    ("members", "method", "told"),
    [
        (["none=identity"], "task", "at least one adapter"),
        (["feel", "none=identity"], "task", "has no head"),
        (["law", "none=identity"], "arrow", "'none' is identity"),
        (["law", "none=identity"], "phatgoose", "'none' is the bare base"),
        (["law", "none=identity"], "gate", "'none' is the bare base"),
    ],
)
def test_where_the_bare_base_cannot_stand_it_is_refused_by_name(place, members, method, told):
    texts = {text.partition("=")[0]: ["To be or not to be"] for text in members}
    with pytest.raises(UsageError, match=told):
        router.fit(members, method, "local/wrong@1.0.0", data=texts)
    assert not Store().list(name="local/wrong")


def test_a_member_without_a_digest_is_the_base_or_refused(place, tmp_path):
    from hub.pack import pack

    artifact = router.fit(["law", "none=identity"], "task", "local/odd@1.0.0")
    out = artifact.materialize(tmp_path / "out")
    text = (out / "router.json").read_text("utf-8")
    (out / "router.json").unlink()
    (out / "router.json").write_text(text.replace('"identity"', '"local/code"'), encoding="utf-8")
    pack(out, artifact.manifest.draft().model_copy(update={"version": "2.0.0"}))
    with pytest.raises(IntegrityError, match=r"local/code.*no digest"):
        router.load(Store().put(out).ref)
