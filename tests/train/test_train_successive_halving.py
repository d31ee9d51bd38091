"""`hub race`, `hub eval` and `hub methods`; stopping by time; curves as a page."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from hub.cli import main
from hub.errors import UsageError
from train import successive_halving as race
from train.config import TrainConfig
from train.loop import fit
from train.pipeline import run

LM = {"max_length": 32, "batch_size": 8, "duration": 60, "eval_every": 30, "lr": 5e-3}


def hub(*words):
    found = CliRunner().invoke(main, list(words))
    assert found.exit_code == 0, found.output + repr(found.exception)
    return found


def test_a_run_that_stopped_by_time_goes_on_exactly(toy, ragged_lm, config, tmp_path):
    data, held = ragged_lm(), ragged_lm(seed=1)
    run_ = config(duration=12, eval_every=4)
    model, adapter = toy()
    whole = fit(model, adapter, data, held, run_)
    model, other = toy()
    first = fit(model, other, data, held, run_, out=tmp_path, seconds=1e-9)
    assert (first.stopped, first.steps) == ("time", 1)
    assert first.best["step"] == 1
    model, third = toy()
    again = fit(model, third, data, held, run_, out=tmp_path, resume=True, seconds=1e9)
    assert (again.stopped, again.steps) == ("finished", 12)
    assert all((a == b).all() for a, b in zip(adapter.parameters(), third.parameters(), strict=True))
    assert min(whole.best["loss"], first.best["loss"]) == again.best["loss"]


def test_a_race_halves_the_field_at_equal_times(notes, tmp_path, monkeypatch):
    """Each round shares its time equally among those who are left; the better half goes on from where it was."""
    asked = []
    losses = {"lora": 2.0, "ia3": 3.0, "bitfit": 1.0, "prompt": 4.0}

    def train(runner, config, until, folder):
        asked.append((runner.method, round(until, 6)))
        measured = {"loss": losses[runner.method]}
        return race.replace(runner, rounds=runner.rounds + 1, seconds=until, measured=measured, trainable=10)

    monkeypatch.setattr(race, "_train", train)
    config = TrainConfig(data={"train": notes, "eval": 0.2}, options={"lora": {"r": 2}}, **LM)
    places = race.race(config, list(losses), 80.0, tmp_path / "race")
    assert sorted(p.name for p in (tmp_path / "race").iterdir()) == ["race.json", "race.svg"]
    assert asked == [(name, 10.0) for name in losses] + [("bitfit", 30.0), ("lora", 30.0)]
    assert [r.method for r in places] == ["bitfit", "lora", "ia3", "prompt"]
    assert race._of(config, "lora", list(losses)).options == {"r": 2}
    assert race._of(config, "ia3", list(losses)).options == {}


def test_the_run_of_one_method_races_as_it_is(notes):
    """`options` without a method's name are of the run's own method."""
    config = TrainConfig(data={"train": notes, "eval": 0.2}, options={"r": 2, "bitfit": {}}, **LM)
    runs = race._entered(config, ["lora", "bitfit"])
    assert (runs["lora"].options, runs["bitfit"].options) == ({"r": 2}, {})
    for options, names in (({"r": 2}, ["ia3", "bitfit"]), ({"lora": 2}, ["lora", "bitfit"])):
        with pytest.raises(UsageError, match="is not the options of a method that races"):
            race._entered(config.model_copy(update={"options": options}), names)


def test_a_race_from_the_shell_leaves_a_table_and_a_plot(notes, tmp_path):
    out = tmp_path / "race"
    words = [f"data.train={notes}", "data.eval=0.2", *(f"{k}={v}" for k, v in LM.items()), "options.lora.r=2"]
    found = hub("race", *words, "--methods", "lora,bitfit", "--budget", "1s", "--out", str(out), "--json", "-")
    places = json.loads(found.stdout)
    assert {p["method"] for p in places} == {"lora", "bitfit"}
    assert all(p["steps"] >= 1 and p["trainable"] > 0 and p["measured"]["loss"] > 0 for p in places)
    assert places[0]["measured"]["loss"] <= places[1]["measured"]["loss"]
    svg = (out / "race.svg").read_text()
    assert "lora" in svg
    assert "trained parameters" in svg
    for bad, said in (
        (["--methods", "lora"], "two or more different methods"),
        (["--methods", "lora,lorra"], "did you mean lora"),
        (["--methods", "lora,ia3", "--budget", "soon"], "is not a time"),
        (["--methods", "ia3,bitfit"], "options.lora is not the options of a method that races"),
        (["--methods", "lora,ia3", "options.ia.r=2"], "did you mean 'ia3'"),
        (["--methods", "ia3,lora", "options.lora.rr=2"], "has no option 'rr'"),
    ):
        refused = CliRunner().invoke(main, ["race", *words, *bad, "--out", str(tmp_path / "other")])
        assert refused.exit_code == 2
        assert said in refused.output


def test_eval_measures_an_adapter_as_its_run_did(notes, tmp_path):
    values = {**LM, "duration": 4, "eval_every": 4}
    config = TrainConfig(data={"train": notes, "eval": notes}, options={"r": 2}, **values)
    out = run(config, folder=tmp_path / "run", ref="me/notes@1.0.0")
    page = (tmp_path / "run" / "curves.html").read_text()
    assert "<svg" in page
    assert f"{out.result.best['loss']:.4g}" in page
    found = json.loads(hub("eval", "me/notes@1.0.0", notes, "--max-length", "32", "--json", "-").stdout)
    assert found["measures"]["loss"] == pytest.approx(out.result.best["loss"], rel=1e-5)
    assert out.as_dict()["held_out_rows_also_in_training"] == 1
    assert found["trained_on"] == ["notes.txt"]
    facts = ("--base", "builtin:tiny-lm", "--task", "causal_lm", "--max-length", "32", "--json", "-")
    bare = json.loads(hub("eval", "none", notes, *facts).stdout)
    assert bare["trained_on"] == []
    assert bare["measures"]["loss"] > found["measures"]["loss"]
    half = json.loads(hub("eval", "0.5 * me/notes@1.0.0", notes, "--max-length", "32", "--json", "-").stdout)
    assert found["measures"]["loss"] < half["measures"]["loss"] < bare["measures"]["loss"]
    for words, code, said in (
        (["none", notes], 2, "give --base"),
        (["me/notes", notes, "--task", "causal"], 2, "task: Input should be"),
        (["me/notes", notes, "--column", "txt=body"], 2, "did you mean 'text'"),
        (["me/notes", notes, "--max-length", "600"], 1, "--max-length 512"),
        (["me/notes", notes, "--json", str(tmp_path)], 2, "cannot be written"),
    ):
        refused = CliRunner().invoke(main, ["eval", *words])
        assert (refused.exit_code, refused.stdout) == (code, ""), words
        assert said in refused.stderr


def test_methods_are_listed_and_described():
    rows = json.loads(hub("methods", "--json").stdout)
    assert {"lora", "houlsby", "mam", "s4", "diff_pruning"} <= {row["method"] for row in rows}
    assert all(row["what"] and row["kind"] for row in rows)
    one = hub("methods", "sora").stdout
    assert "sparsity" in one
    assert "hub compose kinds lora" in one
    table = hub("methods", "--markdown").stdout
    assert len(table.splitlines()) == len(rows) + 2
