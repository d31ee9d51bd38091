"""`hub train` as a user types it; the slow parts in real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from hub.cli import main
from hub.store import Store
from train.checkpoint import read_checkpoint
from train.config import TrainConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Run the CLI in an empty folder; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str):
        done = CliRunner().invoke(main, ["train", *words])
        return done.exit_code, done.stdout, done.stderr

    return call


@pytest.fixture
def run_file(tmp_path, notes):
    path = tmp_path / "tone.yaml"
    values = {"data": {"train": notes, "eval": 0.2}, "max_length": 32, "batch_size": 8, "duration": 4, "lr": 5e-3}
    path.write_text(yaml.safe_dump({**values, "options": {"r": 2}}))
    return str(path)


def test_it_trains_publishes_and_reports(hub, run_file, tmp_path):
    code, out, err = hub(run_file, "seed=3", "--json", "report.json")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "local/tone@0.1.0"
    assert "perplexity" in lines[1]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ref"] == "local/tone@0.1.0"
    assert report["best"]["step"] == 4
    assert report["folder"] == str(Path("runs") / "tone")
    assert Store().get("tone").manifest.hyperparameters["training"]["seed"] == 3
    again = hub(run_file, "--out", "elsewhere", "--json", "-", "--no-publish")
    assert json.loads(again[1])["folder"] == "elsewhere"
    code, _, err = hub(run_file)
    assert code == 2
    assert "holds an earlier run" in err
    assert "--resume" in err


def test_dry_run_shows_the_cost_and_what_is_learned_and_leaves_nothing(hub, tmp_path):
    Path("qa.jsonl").write_text(json.dumps({"prompt": "The sky is", "completion": " blue."}) + "\n")
    words = ["data.train=qa.jsonl", "options.r=4", "max_length=64", "--dry-run"]
    code, out, err = hub(*words)
    assert code == 0, err
    assert "lora, rank 4" in out
    assert "model.layers.*.self_attn.q_proj" in out
    assert "The sky is« blue.<|end|>»" in out  # only the completion is marked as learned
    code, out, _ = hub(*words, "--json", "-")
    found = json.loads(out)
    assert found["trainable"] == sum(4 * (192 + out) * 6 for out in (192, 64))  # q and v of six layers
    assert found["changed"] == sum(192 * out * 6 for out in (192, 64))
    assert found["total"] == 3_148_224
    assert found["memory"]["base"] == 4 * found["total"]
    assert found["memory"]["activations"] > 0
    assert found["steps"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["qa.jsonl"]
    assert Store().list() == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "nothing to train"),
        (["nowhere.yaml"], 2, "no such run file"),
        (["a.yaml", "b.yaml"], 2, "one run file"),
        (["lrr=1"], 2, "did you mean 'lr'"),
        (["lr=-1"], 2, "lr: "),
        (["data.train=nowhere.jsonl"], 1, "no such file: nowhere.jsonl"),
        (["duration=3"], 1, "no training data"),
        (["data.train=x.txt", "method=loar"], 1, "did you mean 'lora'"),
        (["data.train=x.txt", "--name", "Not A Name"], 2, "is not"),
        (["data.train=x.txt", "base=builtin:tiny-ml"], 1, "tiny-lm"),
    ],
)
def test_each_mistake_ends_in_one_sentence_and_an_exit_code(hub, words, code, said):
    Path("x.txt").write_text("Some words to learn from.\n" * 20)
    got, out, err = hub(*words)
    assert got in (1, 2) if code == 1 else got == code
    assert said in err
    assert out == ""
    assert Store().list() == []
    assert not Path("runs").exists() or not list(Path("runs").glob("*/adapter"))


def test_fields_lists_every_key_with_its_help(hub):
    code, out, _ = hub("--fields")
    assert code == 0
    for name, field in TrainConfig.model_fields.items():
        assert f"{name} = " in out
        assert field.description in out


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "HUB_HOME": str(home), "PYTHONPATH": str(ROOT), "SOURCE_DATE_EPOCH": "1700000000"}


def test_a_killed_run_resumes_to_the_same_artifact(run_file, tmp_path):
    words = [sys.executable, "-m", "hub.cli", "train", run_file, "duration=12", "--save-every", "1"]
    checkpoint = tmp_path / "b" / "checkpoint.safetensors"
    process = subprocess.Popen(
        [*words, "--out", str(tmp_path / "b")], env=environment(tmp_path / "home-b"), cwd=tmp_path
    )
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < read_checkpoint(checkpoint)["result"]["steps"] < 12
    resume = [*words, "--out", str(tmp_path / "b"), "--resume"]
    subprocess.run(resume, env=environment(tmp_path / "home-b"), cwd=tmp_path, check=True, capture_output=True)
    straight = [*words, "--out", str(tmp_path / "a")]
    subprocess.run(straight, env=environment(tmp_path / "home-a"), cwd=tmp_path, check=True, capture_output=True)
    digests = [Store(tmp_path / home).get("tone").digest for home in ("home-a", "home-b")]
    assert digests[0] == digests[1]


def test_two_processes_make_the_same_adapter_as_one(run_file, tmp_path):
    """Real processes of `accelerate launch`; their gradients are summed, so the loss curve is that of one process."""
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    words = ["-m", "hub.cli", "train", run_file, "--json", "-", "--out"]
    curves, outputs = [], []
    for prefix, name in (([sys.executable], "one"), (launch, "two")):
        done = subprocess.run(
            [*prefix, *words, str(tmp_path / name)],
            env=environment(tmp_path / f"home-{name}"),
            cwd=tmp_path,
            check=False,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        outputs.append(json.loads(done.stdout))
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        curves.append([r["loss"] if "loss" in r else r["eval"]["loss"] for r in records])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert outputs[0]["ref"] == outputs[1]["ref"] == "local/tone@0.1.0"
