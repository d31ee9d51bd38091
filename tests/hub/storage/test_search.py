"""`hub search`, filters by metric, and lists with a figure."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hub.cli import main
from hub.errors import UsageError
from hub.store import Store


def run(*words: str) -> Result:
    return CliRunner().invoke(main, list(words), catch_exceptions=False)


def metrics(**values: float):
    return tuple({"dataset": "d", "metric": name, "value": value} for name, value in values.items())


@pytest.fixture
def store(hub_home: Path, packed) -> Store:
    """Four adapters; `legal` stands in the name of one and in the summary of another."""
    store = Store(hub_home)
    for ref, facts in {
        "acme/legal@1.0": {"summary": "Reads contracts", "metrics": metrics(accuracy=0.7), "task": "chat"},
        "acme/legal@1.1": {"summary": "Reads contracts", "metrics": metrics(accuracy=0.9, loss=1.0), "task": "chat"},
        "acme/tone@1.0": {"summary": "A legal tone", "metrics": metrics(accuracy=0.8, loss=0.5), "kind": "ia3"},
        "bob/code@2.0": {"summary": "Writes code", "labels": ("sentimental",)},
    }.items():
        store.put(packed(ref, seed=len(ref) + len(facts), **facts)[0])
    return store


def found(*words: str) -> list[str]:
    return [row["ref"] for row in json.loads(run("search", *words, "--json").stdout)]


@pytest.mark.parametrize(
    ("words", "refs"),
    [
        (("legal",), ["acme/legal@1.1", "acme/tone@1.0"]),  # a name weighs more than a summary
        (("legal", "--all-versions"), ["acme/legal@1.0", "acme/legal@1.1", "acme/tone@1.0"]),
        (("legal", "--kind", "ia3"), ["acme/tone@1.0"]),
        (("legal", "tone"), ["acme/tone@1.0"]),
        (("sentim",), ["bob/code@2.0"]),
        (("contract",), ["acme/legal@1.1"]),  # stemmed
        (("legal", "--metric", "accuracy>=0.85"), ["acme/legal@1.1"]),
        (("legal", "--metric", "accuracy"), ["acme/legal@1.1", "acme/tone@1.0"]),
        (("legal", "--metric", "loss"), ["acme/tone@1.0", "acme/legal@1.1"]),  # the least loss first
        (("legal", "--namespace", "bob"), []),
        (("legal", "--limit", "1"), ["acme/legal@1.1"]),
        (("'; DROP", "TABLE", "search"), []),
    ],
)
def test_search(store: Store, words: tuple[str, ...], refs: list[str]) -> None:
    assert sorted(found(*words)) == sorted(refs)
    if "--all-versions" not in words:
        assert found(*words) == refs


def test_lists_show_the_figure_they_are_sorted_by(store: Store) -> None:
    lines = run("list", "--sort", "accuracy", "--newest").stdout.splitlines()
    assert lines[0].split()[-1] == "ACCURACY"  # no alias: that column is empty, and left out
    assert [line.split()[0] for line in lines[1:]] == ["acme/legal", "acme/tone"]
    assert "0.9" in lines[1]
    rows = json.loads(run("list", "--sort", "loss", "--json").stdout)
    assert [row["scores"][0]["value"] for row in rows] == [0.5, 1.0]
    assert "ACCURACY" not in run("list").stdout
    assert [row["ref"] for row in json.loads(run("list", "--metric", "loss<0.7", "--json").stdout)] == ["acme/tone@1.0"]


def test_bad_questions(store: Store) -> None:
    assert run("search", "--", "---").exit_code == 2
    for bound in ("accuracy>=x", "accuracy>", ">=2", "a<b<c"):
        with pytest.raises(UsageError, match="no bound"):
            store.list(metric=bound)
