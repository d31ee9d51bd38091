from __future__ import annotations

import pytest
from pydantic import ValidationError

import compose
from train.config import TrainConfig, load_config, span_in_steps
from train.data.datasets import load_splits
from train.errors import ConfigError
from train.loop import fit


def test_stays_flat_and_small_with_help_for_every_field():
    fields = TrainConfig.model_fields
    assert len(fields) <= 25
    assert all(field.description for field in fields.values())


def test_is_frozen_and_its_digest_follows_every_field():
    config = TrainConfig()
    with pytest.raises(ValidationError):
        config.lr = 1.0
    assert config.digest == TrainConfig().digest
    assert config.digest != TrainConfig(seed=1).digest
    assert TrainConfig(options={"a": 1, "b": 2}).digest == TrainConfig(options={"b": 2, "a": 1}).digest


@pytest.mark.parametrize(
    ("key", "suggestion"), [("learning_rat", ""), ("optimiser", "optimizer"), ("batchsize", "batch_size")]
)
def test_an_unknown_key_is_refused_with_the_nearest_one(key, suggestion):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"{key}=1"])
    assert f"unknown key {key!r}" in str(caught.value)
    assert suggestion in str(caught.value)
    assert caught.value.exit_code == 2


def test_yaml_and_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lr: 1e-3\noptions: {r: 4}\nduration: 2 epochs\ndata:\n  train: a.jsonl\n")
    config = load_config(path, ["options.r=16", "options.target_modules=[q_proj]", "seed=3", "data.eval=0.25"])
    assert config.lr == 1e-3
    assert config.options == {"r": 16, "target_modules": ["q_proj"]}
    assert (config.seed, config.duration) == (3, "2 epochs")
    assert config.data == {"train": "a.jsonl", "eval": 0.25}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr: [1\n", "line 2, column 1"),
        ("- a\n- b\n", "holds a list"),
        ("lr: fast\n", "lr: "),
        ("duration: 3 fortnights\n", "not a span"),
        ("duration: 0\n", "nothing would be trained"),
        ("schedule: cosin\n", "schedule: "),
        ("data: {trian: x}\n", "did you mean 'train'"),
        ("data: {train: x, eval: 2.0}\n", "fraction between 0 and 1"),
        ("columns: {txt: body}\n", "did you mean 'text'"),
        ("metric: accuracy\n", "not one of task causal_lm"),
        ("base: \xff\n", "unacceptable"),
        ("lr: 1e-3\nseed: 1\nlr: 1e-4\n", "line 3, column 1: the key 'lr' is given twice"),
        ("options:\n  r: 4\n  r: 8\n", "line 3, column 3: the key 'r' is given twice"),
        ("task: classification\ndata: {train: x, packing: true}\n", "task classification has none"),
        ("columns: {label: stars}\n", "columns.label: task causal_lm reads text, prompt"),
    ],
)
def test_each_bad_file_says_what_and_where(tmp_path, text, said):
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    if "\xff" not in text:
        assert said in str(caught.value)
    assert caught.value.path == str(path)


@pytest.mark.parametrize("idle", [{"patience": 2}, {"metric": "loss"}])
def test_what_is_said_of_evaluations_needs_rows_to_measure_on(tmp_path, toy, ragged_lm, idle):
    (tmp_path / "a.txt").write_text("Some text.")
    config = TrainConfig(data={"train": str(tmp_path / "a.txt")}, **idle)
    with pytest.raises(ConfigError, match=f"{next(iter(idle))} without held-out rows") as caught:
        load_splits(config, compose.tokenizer("builtin:tiny-lm"))
    assert "data.eval" in caught.value.hint
    model, adapter = toy()
    with pytest.raises(ConfigError, match="without held-out rows"):
        fit(model, adapter, ragged_lm(8), None, config)


def test_packing_of_texts_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("Some text.")
    config = TrainConfig(data={"train": str(tmp_path / "a.txt"), "packing": True})
    with pytest.raises(ConfigError, match="not texts"):
        load_splits(config, compose.tokenizer("builtin:tiny-lm"))


@pytest.mark.parametrize("override", ["lr", "=3", "lr.deep=1", "lr=[1"])
def test_bad_overrides(tmp_path, override):
    path = tmp_path / "run.yaml"
    path.write_text("lr: 0.1\n")
    with pytest.raises(ConfigError):
        load_config(path, [override])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such run file"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("span", "steps"),
    [
        (0, 0),
        (7, 7),
        ("7 steps", 7),
        ("1 step", 1),
        ("2 epochs", 20),
        ("0.5epochs", 5),
        ("0.01 epochs", 1),
        ("0 epochs", 0),
    ],
)
def test_spans(span, steps):
    assert span_in_steps(span, 10) == steps
