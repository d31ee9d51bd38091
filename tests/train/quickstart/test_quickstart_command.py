"""`hub quickstart` as a user types it: streams, exit codes, and bad input before any work."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from hub.cli import main


def hub(*words, home, cwd, timeout=300):
    """Run the command in its own process; returns (exit code, stdout, stderr)."""
    environment = {**os.environ, "HUB_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "100"}
    command = [sys.executable, "-m", "hub", "quickstart", *map(str, words)]
    done = subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_prints_figures_to_stdout_and_chatter_to_stderr(two_domains, tmp_path):
    words = [f"--domain={name}={path}" for name, path in two_domains.items()]
    code, out, err = hub(*words, "--steps", 3, "--json", "deep/er/figures.json", home=tmp_path / "home", cwd=tmp_path)
    assert code == 0, err
    assert "DEMix posterior" in out
    assert "quickstart/ledger@0.1.0: trained in" in err
    assert "trained" not in out
    facts = json.loads((tmp_path / "deep" / "er" / "figures.json").read_text())
    assert set(facts["domains"]) == {"ledger", "tale"}
    report = (tmp_path / "quickstart-out" / "report.html").read_text()
    assert report.startswith("<!doctype html>")
    assert f"{facts['domains']['tale']['demix']:.2f}" in report

    code, out, err = hub(*words, "--steps", 3, "--json", "-", "--out", "again", home=tmp_path / "home", cwd=tmp_path)
    assert code == 0, err
    again = json.loads(out)  # nothing else is on stdout
    assert [e["trained"] for e in again["experts"].values()] == [False, False]
    assert "trained already" in err
    for name in facts["domains"]:
        assert again["domains"][name]["demix"] == pytest.approx(facts["domains"][name]["demix"], rel=1e-4)


def refused(words, tmp_path, monkeypatch):
    """Run words that must fail, in this process; returns (exit code, stderr)."""
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["quickstart", *words], env={"HUB_HOME": str(tmp_path / "home")})
    assert isinstance(done.exception, SystemExit), done.exception  # no traceback
    assert done.stdout == ""
    assert not (tmp_path / "quickstart-out" / "report.html").exists()
    assert not list((tmp_path / "home").glob("blobs/sha256/*"))  # nothing was published
    return done.exit_code, " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--domain", "a=a.txt"], 2, "at least two domains, got 1"),
        (["--domain", "a=a.txt", "--domain", "b=nowhere"], 2, "nowhere does not exist"),
        (["--domain", "a=a.txt", "--domain", "b=empty.txt"], 2, "empty.txt holds no text"),
        (["--domain", "a=a.txt", "--domain", "b=binary"], 2, "is a binary file"),
        (["--domain", "a=a.txt", "--domain", "a"], 2, "is not NAME=PATH"),
        (["--domain", "a=short.txt", "--domain", "b=a.txt"], 2, "domain 'a' has too little text"),
        (["--domain", "a=a.txt", "--domain", "b=b.txt", "--base", "no/such-dir"], 1, "no/such-dir"),
        (["--domain", "a=a.txt", "--domain", "b=b.txt", "--kind", "lorra"], 2, "did you mean lora"),
        (["--kind", "bad"], 2, "kinds are attention_fusion, bias, bottleneck"),
        (["--quantize", "nf3"], 2, "nf3"),
        (["--seed", "-1"], 2, "-1"),
    ],
)
def test_bad_input_is_named_before_any_work(tmp_path, two_domains, monkeypatch, words, code, message):
    for name, folder in (("a", "ledger"), ("b", "tale")):
        texts = [file.read_text() for file in sorted(two_domains[folder].iterdir())]
        (tmp_path / f"{name}.txt").write_text("\n\n".join(texts * 2 if name == "b" else texts))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("A few words. " * 40)
    (tmp_path / "binary").write_bytes(b"text\x00\x01\x02")
    found, err = refused(words, tmp_path, monkeypatch)
    assert message in err
    assert found == code


def test_a_kind_is_called_like_its_file():
    """That is how the command knows the kinds without importing torch."""
    from compose.kind.registry import KINDS

    assert KINDS.names() == list(KINDS)


def test_a_bad_kind_is_refused_without_torch():
    code = (
        "import sys; from hub.cli import main\n"
        "try: main(['quickstart', '--kind', 'bad'])\n"
        "except SystemExit as end: print(end.code, {'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 set()\n"


@pytest.mark.parametrize("words", [["--out", "file"], ["--out", "file/below"], ["--json", "file/x.json"]])
def test_places_that_cannot_be_written(tmp_path, two_domains, monkeypatch, words):
    (tmp_path / "file").write_text("in the way")
    domains = [f"--domain={name}={path}" for name, path in two_domains.items()]
    code, err = refused([*domains, *words], tmp_path, monkeypatch)
    assert code in (1, 2)
    assert "file" in err
    assert (tmp_path / "file").read_text() == "in the way"


def test_bad_domains_are_refused_without_importing_torch(tmp_path):
    program = (
        "import sys; from hub.cli import main\n"
        "try: main(['quickstart', '--domain', 'a=x', '--domain', 'b=y'])\n"
        "except SystemExit as done: print(done.code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HUB_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["2", "False", "False"], done.stderr
