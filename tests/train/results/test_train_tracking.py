"""Trackers of accelerate get every record; one that is not installed is refused."""

from __future__ import annotations

import pytest
from accelerate.tracking import GeneralTracker, get_available_trackers

from hub.errors import UsageError
from train.config import TrainConfig
from train.pipeline import run


class Notebook(GeneralTracker):
    name = "notebook"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.config, self.logged, self.ended = {}, [], False

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **_):
        self.logged.append((step, values))

    def finish(self):
        self.ended = True


@pytest.fixture
def small(notes):
    values = {"max_length": 32, "batch_size": 8, "duration": 4, "eval_every": 2, "lr": 5e-3, "options": {"r": 2}}
    return TrainConfig(data={"train": notes, "eval": 0.2}, **values)


def test_a_tracker_follows_the_run(small, tmp_path):
    book = Notebook()
    out = run(small, folder=tmp_path / "run", ref="me/notes", trackers=[book])
    assert (book.config["options.r"], book.config["lr"], book.config["run"]) == (2, 5e-3, small.digest)
    losses = {step: values["train/loss"] for step, values in book.logged if "train/loss" in values}
    assert losses == {r["step"]: r["loss"] for r in out.result.history if "loss" in r}
    held = {step: values["eval/loss"] for step, values in book.logged if "eval/loss" in values}
    assert set(held) == {2, 4}
    assert book.ended


def test_a_tracker_that_is_not_there_is_refused(small, tmp_path):
    with pytest.raises(UsageError, match="tracker 'nowhere' is not installed"):
        run(small, folder=tmp_path / "run", ref="me/notes", trackers=["nowhere"])
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(
    "tensorboard" not in [str(getattr(t, "value", t)) for t in get_available_trackers()], reason="needs tensorboard"
)
def test_tensorboard_writes_event_files(small, tmp_path):
    run(small, folder=tmp_path / "run", ref="me/notes", trackers=["tensorboard"])
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))
