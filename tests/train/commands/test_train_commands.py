"""`hub train` as a user types it; the slow parts in real processes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from rich.console import Console

from hub.cli import main
from hub.store import Store
from train.config import TrainConfig
from train.dry_run import preview, show
from train.pipeline import prepare
from train.steps.checkpoint import read_checkpoint

ROOT = Path(__file__).parents[3]


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
    assert len(err.splitlines()) == 1  # where it is; no bar in a pipe
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
    assert "--resume" not in err  # it has ended: there is nothing to go on from


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


def test_what_is_learned_is_green_on_a_terminal(tmp_path):
    file = tmp_path / "qa.jsonl"
    file.write_text(json.dumps({"prompt": "The sky is", "completion": " blue."}) + "\n")
    ready = prepare(TrainConfig(data={"train": str(file)}))
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    show(preview(ready), ready, console)
    assert "\x1b[2mThe sky is\x1b[0m\x1b[32m blue.<|end|>\x1b[0m" in console.file.getvalue()


def test_dry_run_counts_what_recomputing_spares(notes):
    config = TrainConfig(data={"train": notes}, max_length=64, batch_size=8)
    kept = []
    for recompute in (False, True):
        ready = prepare(config.model_copy(update={"gradient_checkpointing": recompute}))
        before = {name: value.clone() for name, value in ready.adapter.state_dict().items()}
        kept.append(preview(ready).memory["activations"])
        assert not ready.model.is_activation_checkpointing
        assert all(torch.equal(value, before[name]) for name, value in ready.adapter.state_dict().items())
        assert all(p.grad is None for p in ready.adapter.parameters())
    assert 0 < kept[1] < 0.6 * kept[0]


@pytest.mark.parametrize(
    ("task", "row", "shown"),
    [
        ("classification", {"text": "good film", "label": "pos"}, "[CLS] good film [SEP]« pos »"),
        ("regression", {"text": "good film", "label": 2.5}, "[CLS] good film [SEP]« 2.5 »"),
        ("token_classification", {"tokens": ["good", "film"], "tags": ["A", "B"]}, "[CLS]«good film»[SEP]"),
        ("seq2seq", {"prompt": "good film", "completion": "the plot"}, "good film [SEP]« the plot [SEP] »"),
    ],
)
def test_dry_run_of_every_task(hub, bert_base, t5_base, task, row, shown):
    other = {"label": "neg"} if task == "classification" else {}
    Path("rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (row, {**row, **other})))
    base = t5_base if task == "seq2seq" else bert_base
    code, out, err = hub(f"base={base}", f"task={task}", "data.train=rows.jsonl", "max_length=16", "--dry-run")
    assert code == 0, err
    assert f"first example: {shown}" in out
    assert err == ""


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "nothing to train"),
        (["nowhere.yaml"], 2, "no such run file"),
        (["a.yaml", "b.yaml"], 2, "one run file"),
        (["lrr=1"], 2, "did you mean 'lr'"),
        (["lr=-1"], 2, "lr: "),
        (["lr=.inf"], 2, "lr: "),
        (["data.train=nowhere.jsonl"], 1, "no such file: nowhere.jsonl"),
        (["duration=3"], 2, "no training data"),
        (["data.train=x.txt", "method=loar"], 2, "did you mean lora"),
        (["data.train=x.txt", "options.rr=1"], 2, "did you mean 'r'"),
        (["data.train=x.txt", "--json", "x.txt/x.json"], 2, "is in the way"),
        (["data.train=x.txt", "--name", "Not A Name"], 2, "is not"),
        (["data.train=x.txt", "base=builtin:tiny-ml"], 1, "tiny-lm"),
    ],
)
def test_each_mistake_ends_in_one_sentence_and_an_exit_code(hub, words, code, said):
    Path("x.txt").write_text("Some words to learn from.\n" * 20)
    got, out, err = hub(*words)
    assert got == code
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


def test_a_killed_run_resumes_to_the_same_artifact(hub, run_file, tmp_path, monkeypatch):
    process = subprocess.Popen(
        [sys.executable, "-m", "hub.cli", "train", run_file, "duration=12", "--out", "killed", "--save-every", "1"],
        env=environment(tmp_path / "home"),
        cwd=tmp_path,
    )
    checkpoint, deadline = tmp_path / "killed" / "checkpoint.safetensors", time.monotonic() + 120
    while not checkpoint.exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < read_checkpoint(checkpoint)["result"]["steps"] < 12
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    digests = []
    for home, words in (("a", ["--out", "straight"]), ("b", ["--out", "killed", "--resume"])):
        monkeypatch.setenv("HUB_HOME", str(tmp_path / home))
        code, _, err = hub(run_file, "duration=12", *words)
        assert code == 0, err
        digests.append(Store().get("tone").digest)
    assert digests[0] == digests[1]
    assert not checkpoint.exists()


def test_two_processes_make_the_same_adapter_as_one(hub, bert_base, reviews, tmp_path):
    """Real processes of `accelerate launch`: gradients and held-out predictions are those of one process."""
    words = [f"base={bert_base}", "task=classification", f"data.train={reviews(30)}", "data.eval=0.3", "max_length=16"]
    words += ["batch_size=5", "duration=6", "eval_every=3", "lr=0.01", "--json", "-"]
    code, out, err = hub(*words, "--out", "one")
    assert code == 0, err
    launch = [
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        "-m",
        "hub.cli",
    ]
    done = subprocess.run(
        [sys.executable, "-m", *launch, "train", *words, "--out", "two"],
        env=environment(tmp_path / "home"),
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    reports = [json.loads(out), json.loads(done.stdout)]  # the second process prints nothing
    assert reports[0]["ref"] == reports[1]["ref"] == "local/lora@0.1.0"
    records = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for one, two in zip(*records, strict=True):
        assert one.get("loss", 0.0) == pytest.approx(two.get("loss", 0.0), rel=1e-4)
        assert one.get("eval", {}) == pytest.approx(two.get("eval", {}), rel=1e-3)


def test_help_and_fields_import_neither_torch_nor_transformers():
    code = (
        "import sys, click\n"
        "from click.testing import CliRunner\n"
        "from hub.cli import main\n"
        "for word in ('--help', '--fields'):\n"
        "    assert CliRunner().invoke(main, ['train', word]).exit_code == 0, word\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
