"""A full disk, met for real: the kernel refuses what grows over a limit, and what was kept is whole."""

from __future__ import annotations

import signal
from contextlib import contextmanager

import pytest

from hub.errors import StoreError
from hub.store import Store
from train.config import TrainConfig
from train.errors import TrainError
from train.pipeline import run
from train.steps.checkpoint import CHECKPOINT, read_checkpoint

resource = pytest.importorskip("resource", reason="limits on files are a thing of POSIX")
VALUES = {"max_length": 32, "batch_size": 8, "duration": 5, "eval_every": 2, "lr": 5e-3, "options": {"r": 4}}
REF = "me/notes@1.0.0"


@contextmanager
def files_up_to(size):
    """No file of this process grows over `size` bytes."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def config(notes, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    return TrainConfig(data={"train": notes, "eval": 0.2}, **VALUES)


@pytest.fixture
def undisturbed(config, tmp_path):
    return run(config, folder=tmp_path / "whole", ref=REF, store=Store(tmp_path / "other")).artifact.digest


def test_a_full_disk_at_a_checkpoint(config, undisturbed, tmp_path):
    """The second one is larger, as it holds the best state as well: it does not fit, and the first one stays."""
    folder = tmp_path / "run"
    with files_up_to(220_000), pytest.raises(TrainError, match="previous checkpoint is intact") as caught:
        run(config, folder=folder, ref=REF, save_every=1)
    assert "checkpoint.safetensors: File too large" in str(caught.value)
    assert "--resume" in caught.value.hint
    assert sorted(p.name for p in folder.iterdir()) == [CHECKPOINT, "config.yaml", "metrics.jsonl", "run.log"]
    assert read_checkpoint(folder / CHECKPOINT)["result"]["steps"] == 1
    assert Store().list() == []
    assert run(config, folder=folder, ref=REF, save_every=1, resume=True).artifact.digest == undisturbed
    assert not (folder / CHECKPOINT).exists()


def test_a_full_disk_at_the_adapter(config, tmp_path):
    """safetensors tells of it in an error of its own."""
    folder = tmp_path / "run"
    with files_up_to(50_000), pytest.raises(TrainError, match=r"adapter_model.safetensors: File too large") as caught:
        run(config, folder=folder, ref=REF)
    assert caught.value.hint == "make room"
    assert not (folder / "adapter").exists()


def test_a_full_disk_at_the_metrics(config, tmp_path):
    with files_up_to(900), pytest.raises(TrainError, match=r"cannot write .*metrics.jsonl: File too large"):
        run(TrainConfig(**{**dict(config), "duration": 12}), folder=tmp_path / "run", ref=REF)


def test_what_cannot_be_published_is_published_later_without_training_anew(config, undisturbed, tmp_path):
    place, folder = tmp_path / "store", tmp_path / "run"
    place.mkdir()
    (place / "blobs").write_text("no directory")
    with pytest.raises(StoreError) as caught:
        run(config, folder=folder, ref=REF, store=Store(place), save_every=100)
    assert "--resume: what was learned is kept" in caught.value.hint
    before = (folder / "metrics.jsonl").read_text()
    (place / "blobs").unlink()
    out = run(config, folder=folder, ref=REF, store=Store(place), resume=True)
    assert out.artifact.digest == undisturbed
    assert (folder / "metrics.jsonl").read_text() == before
    assert out.result.steps == 5
    assert not (folder / CHECKPOINT).exists()
