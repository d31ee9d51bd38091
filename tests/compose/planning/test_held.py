"""How a base is held where nobody says: as its adapters were trained, and it is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compose.planning.held import held_as, manifests_of
from compose.planning.members import AdapterFinder
from hub.errors import NotFound
from hub.manifest import TrainedOn


def trained(name):
    return TrainedOn(quantization=name, compute_dtype="float32")


@pytest.fixture
def held(store, stock, tmp_path: Path):
    stock.publish(store, "ns/qa@1.0.0", tmp_path / "qa", trained_on=trained("nf4"))
    stock.publish(store, "ns/wb@1.0.0", tmp_path / "wb", trained_on=trained("int8"))
    stock.publish(store, "ns/db@1.0.0", tmp_path / "db", trained_on=trained("none"))
    return store


@pytest.mark.parametrize(
    ("refs", "asked", "wanted", "said"),
    [
        (["ns/qa"], None, "nf4", "held as nf4, as ns/qa was trained"),
        (["ns/qa", "ns/a"], None, "nf4", "held as nf4"),  # one that does not say is no other
        (["ns/qa"], "none", "none", ""),
        (["ns/qa"], "int8", "int8", ""),
        (["ns/a"], None, "none", ""),
        (["ns/db"], None, "none", ""),
        ([], None, "none", ""),
        (["ns/qa", "ns/wb"], None, "none", "held as int8 and as nf4: it is held whole"),
        (["ns/qa", "ns/db"], None, "none", "held as nf4 and as none: it is held whole"),
    ],
)
def test_as_the_adapters_were_trained(refs, asked, wanted, said, held, capsys) -> None:
    assert held_as(asked, manifests_of(refs, AdapterFinder(held))) == wanted
    streams = capsys.readouterr()
    assert streams.out == ""
    assert said in streams.err
    assert streams.err.count("\n") == bool(said)  # once


def test_members_of_compositions_count(held, cli, capsys) -> None:
    assert cli("compose", "ns/qa + 0.5 * ns/a", "-o", "ns/both@1.0.0").exit_code == 0
    found = manifests_of(["ns/both"], AdapterFinder(held))
    assert {m.name for m in found} == {"ns/both", "ns/qa", "ns/a"}
    assert held_as(None, found) == "nf4"
    with pytest.raises(NotFound):
        manifests_of(["ns/nothing"], AdapterFinder(held))


def test_what_is_checked_and_explained_is_held_as_it_will_run(held, cli) -> None:
    checked = cli("compose", "check", "ns/qa")
    assert checked.exit_code == 0, checked.output
    assert checked.stderr.count("held as nf4, as ns/qa was trained") == 1
    assert "this one is held as" not in checked.stderr
    whole = cli("compose", "check", "ns/qa", "--quantize", "none")
    assert "ns/qa was trained on a base held as nf4; this one is held as none" in whole.stderr
    explained = [
        json.loads(cli("compose", "explain", "ns/qa", "--json", *w).stdout)["base"] for w in ((), ("--quantize", "nf4"))
    ]
    assert explained[0] == explained[1]
    assert explained[0]["quantize"] == "nf4"


def test_the_commands_say_it_once_and_hold_it_so(held, cli, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a plain sentence about nothing"}) + "\n")
    out = {}
    for name, words in {"as trained": (), "asked": ("--quantize", "nf4"), "whole": ("--quantize", "none")}.items():
        done = cli(
            "run", str(tmp_path / "rows.jsonl"), "--expr", "ns/qa", "--max-new-tokens", "2", "--scores", "4", *words
        )
        assert done.exit_code == 0, done.output
        assert done.stderr.count("held as nf4") == (name == "as trained")
        out[name] = done.stdout
    assert out["as trained"] == out["asked"] != out["whole"]
    measured = cli("eval", "ns/qa", str(tmp_path / "rows.jsonl"), "--json", "-")
    asked = cli("eval", "ns/qa", str(tmp_path / "rows.jsonl"), "--quantize", "nf4", "--json", "-")
    assert measured.stderr.count("held as nf4, as ns/qa was trained") == 1
    assert json.loads(measured.stdout)["measures"] == json.loads(asked.stdout)["measures"]
