"""What `import train` shows, and that the commands do no more than it does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import train
from hub.store import Store
from train.errors import ConfigError

RUN = {"duration": 2, "max_length": 32, "batch_size": 4, "options": {"r": 2}}


def test_every_name_is_there_is_listed_and_costs_nothing_before_it_is_used():
    for package in (train, train.fewshot):
        assert set(package.__all__) <= set(dir(package))
        assert all(callable(getattr(package, name)) for name in package.__all__)
    assert train.__version__
    code = "import sys, train; train.fewshot; dir(train); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_values_are_enough_for_a_run(notes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = train.run({"data": {"train": notes}, **RUN})
    assert (outcome.artifact.ref.id, outcome.folder) == ("local/lora", Path("runs/lora"))
    measured = train.evaluate("local/lora", notes, max_length=32)
    assert measured["measures"]["loss"] > 0
    assert train.preview(train.prepare(train.TrainConfig(data={"train": notes}, **RUN))).steps == 2
    assert {"lora", "houlsby"} <= {row["method"] for row in train.describe_methods()}
    with pytest.raises(ConfigError, match="unknown key 'learning_rate'"):
        train.run({"learning_rate": 1})
    assert [str(artifact.ref) for artifact in Store().list()] == ["local/lora@0.1.0"]
