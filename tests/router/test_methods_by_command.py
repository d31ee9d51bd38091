"""Every routing method with every command, for members that continue texts and for those with heads: it works, or is
refused by name before anything is loaded. The table of docs/routing.md is what was found here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from fastapi.testclient import TestClient

from hub.cli import main
from hub.store import Store
from router.engine.engine import Engine
from router.scorer import SCORERS
from router.serving.app import create_app

BASE = "builtin:tiny-lm"
GUIDE = Path(__file__).parents[2] / "docs" / "routing.md"
MARKS = "<!-- methods by command -->\n", "<!-- end -->\n"
COMMANDS = ("fit", "eval", "explain", "run", "serve", "like")
TEXTS = {
    "law": ["The parties agree that the licence shall end"] * 2,
    "code": ["def add(a, b):\n    return a + b"] * 2,
    "feel": ["a dull and lifeless film", "I loved every minute of it"],
    "theme": ["the match ended in a draw", "troops crossed the river"],
}
LABELS = {"feel": ("bad", "good"), "theme": ("art", "sport")}
HEAD = {"hyperparameters": {"adapter": {"modules_to_save": ["score"]}}}
STEPS = {name for name in SCORERS if "steps" in SCORERS.get(name).Options.model_fields}


@pytest.fixture(scope="module")
def place(published, tmp_path_factory):
    here = tmp_path_factory.mktemp("methods")
    for seed, (name, labels) in enumerate(LABELS.items(), 8):
        if not Store(published.store.root).list(name=f"local/{name}"):
            published.publish(name, seed=seed, labels=labels, **HEAD)
    for name, texts in TEXTS.items():
        rows = [{"text": t, "label": LABELS.get(name, ("-",) * 2)[i], "task": name} for i, t in enumerate(texts)]
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return here


@pytest.fixture(autouse=True)
def home(published, monkeypatch):
    monkeypatch.setenv("HUB_HOME", str(published.store.root))


@pytest.fixture(scope="module")
def client(published, place):
    engine = Engine(BASE, store=Store(published.store.root), dtype="fp32")
    with TestClient(create_app(engine)) as client:
        yield client
    engine.close()


def hub(*words):
    return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)


def fitted(method, members, place):
    """`hub route fit`, with texts and few steps; its result."""
    data = [word for name in members for word in ("--data", f"{name}={place / name}.jsonl")]
    steps = ("--option", "steps=1") if method in STEPS else ()
    ref = f"local/by-{method}-{'-'.join(members)}"
    return ref, hub("route", "fit", *members, "--method", method, *data, *steps, "-o", f"{ref}@1.0.0")


@pytest.mark.parametrize("method", sorted(SCORERS))
def test_members_that_continue_texts_work_in_every_command(method, place, client):
    ref, made = fitted(method, ("law", "code"), place)
    assert made.exit_code == 0, made.output
    asks = SCORERS.get(method).reads_tasks
    told = hub("route", "eval", ref, "--data", f"law={place / 'law.jsonl'}", "--prompt-tokens", 3, "--json", "-")
    (row,) = json.loads(told.stdout)["rows"]
    weights = json.loads(told.stdout)["confusion"]["law"]
    assert row["routed"] > 0 and sum(weights.values()) == pytest.approx(1.0, abs=1e-3)
    explain = ("route", "explain", ref, "--text", "def main", "--json")
    named = ("--task", "law") if asks else ()
    tokens = json.loads(hub(*explain, *named).stdout)["tokens"]
    assert all(sum(token["weights"].values()) == pytest.approx(1.0, abs=1e-3) for token in tokens)
    run = ("run", place / "law.jsonl", "--router", ref, "--route-weights", "--max-new-tokens", 2)
    named = ("--task-column", "task") if asks else ()
    rows = [json.loads(line) for line in hub(*run, *named).stdout.splitlines()]
    assert all(isinstance(r["output"], str) and r["output_weights"] for r in rows) and len(rows) == 2
    body = {
        "model": ref,
        "prompt": TEXTS["law"][0],
        "max_tokens": 2,
        "temperature": 0,
        **({"task": "law"} if asks else {}),
    }
    assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == rows[0]["output"]
    liked = json.loads(hub("route", "like", place / "law.jsonl", "--json").stdout)
    assert liked[0]["ref"] == "local/law@1.0.0"
    if asks:  # who names no member is told so at once
        assert "names none" in hub(*explain).stderr
        assert "--task-column COLUMN" in hub(*run).stderr
        assert "'novel' is none" in hub("route", "eval", ref, "--data", f"novel={place / 'law.jsonl'}").stderr
        assert "names none" in client.post("/v1/completions", json={**body, "task": None}).json()["error"]["message"]
    else:
        assert "chooses by itself" in hub(*explain, "--task", "law").stderr
        assert "chooses by itself" in hub(*run, "--task-column", "task").stderr


@pytest.mark.parametrize("method", sorted(SCORERS))
def test_members_with_heads_work_or_are_refused_by_name(method, place, client, monkeypatch):
    if SCORERS.get(method).continues:
        monkeypatch.setattr("router.api.on_base", None)
        told = fitted(method, ("feel", "theme"), place)[1]
        assert told.exit_code == 2 and f"{method} is for members that continue texts" in told.stderr
        return
    ref, made = fitted(method, ("feel", "theme"), place)
    assert made.exit_code == 0, made.output
    asks = SCORERS.get(method).reads_tasks
    evaluate = ("route", "eval", ref, "--data", f"feel={place / 'feel.jsonl'}")
    report = json.loads(hub(*evaluate, "--json", "-").stdout)
    assert report["metric"] == "accuracy" and 0 <= report["rows"][0]["routed"] <= 1
    assert "read whole" in hub(*evaluate, "--prompt-tokens", 4).stderr
    named = ("--task", "feel") if asks else ()
    assert json.loads(hub("route", "explain", ref, "--text", "a dull film", "--json", *named).stdout)["tokens"]
    named = ("--task-column", "task") if asks else ()
    rows = [json.loads(line) for line in hub("run", place / "feel.jsonl", "--router", ref, *named).stdout.splitlines()]
    assert {row["output"] for row in rows} <= {label for labels in LABELS.values() for label in labels}
    body = {"model": ref, "input": TEXTS["feel"], **({"task": "feel"} if asks else {})}
    assert [one["label"] for one in client.post("/v1/classify", json=body).json()["data"]] == [
        r["output"] for r in rows
    ]
    assert {one["ref"] for one in json.loads(hub("route", "like", place / "feel.jsonl", "--json").stdout)} >= {
        "local/feel@1.0.0",
        "local/theme@1.0.0",
    }


def table() -> str:
    """What the tests above hold, for the guide."""
    lines = [f"| method | {' | '.join(COMMANDS)} | members with heads |", "|" + "---|" * (len(COMMANDS) + 2)]
    ways = {"fit": "yes", "eval": "sets of members' names", "explain": "`--task`", "run": "`--task-column`"}
    ways |= {"serve": "field `task`", "like": "with `--data`"}
    for method in sorted(SCORERS):
        scorer = SCORERS.get(method)
        cells = [ways[c] if scorer.reads_tasks or (c == "like" and not scorer.needs_data) else "yes" for c in COMMANDS]
        lines.append(f"| `{method}` | {' | '.join(cells)} | {'refused' if scorer.continues else 'yes'} |")
    return "\n".join(lines) + "\n"


def test_the_guide_has_the_table():
    _, _, rest = GUIDE.read_text("utf-8").partition(MARKS[0])
    assert rest.partition(MARKS[1])[0] == table()


def test_a_packed_directory_is_a_member_and_runs(published, place, client, tmp_path, monkeypatch):
    """`hub pack` output: nothing is put into the store before the router is."""
    from router.artifact import load

    source = published.store.get("local/law")
    packed = source.materialize(tmp_path / "packed")
    monkeypatch.setenv("HUB_HOME", str(tmp_path / "home"))
    asked = ("route", "fit", packed, f"same={packed}", "--method", "arrow", "-o", "local/folder@1.0.0")
    failing = ("route", "fit", packed, "--method", "centroid", "-o", "local/folder@1.0.0")
    assert "there is no text for law" in hub(*failing).stderr and not Store().list()
    assert hub(*asked).exit_code == 0
    assert list(load("local/folder").router.experts) == ["law", "same"]
    assert Store().get("local/law").digest == source.digest
    rows = hub("run", place / "law.jsonl", "--router", "local/folder", "--max-new-tokens", 2).stdout
    assert len(rows.splitlines()) == 2
    engine = Engine(BASE, store=Store(), dtype="fp32", adapters={"packed": packed})
    served = TestClient(create_app(engine))
    asked = {"prompt": "The parties", "max_tokens": 4, "temperature": 0}
    answers = [
        served.post("/v1/completions", json={"model": name, **asked}).json()["choices"][0]["text"]
        for name in ("packed", "local/law", "at(packed, layers=[0])", "at(local/law, layers=[0])")
    ]
    assert answers[0] == answers[1] and answers[2] == answers[3]
    engine.close()
