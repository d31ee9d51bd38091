import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from hub.cli import COMMANDS, ERRORS, main
from hub.lazy import load
from hub.store import Store


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


def ok(*arguments: str) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def data(*arguments: str):
    return json.loads(ok(*arguments, "--json").stdout)


@pytest.fixture
def pushed(packed) -> Path:
    """HUB_HOME holds acme/tone 1.0.0 and 1.1.0; gives the directory of the latter."""
    ok("push", "--no-trial", str(packed("acme/tone@1.0.0", task="chat")[0]))
    directory, _ = packed("acme/tone@1.1.0", seed=1)
    ok("push", "--no-trial", str(directory))
    return directory


def test_push_a_directory(hub_home: Path, packed) -> None:
    directory, manifest = packed()
    found = data("push", "--no-trial", str(directory), "--tag", "prod")
    assert found["ref"] == "acme/tone@1.0.0"
    assert found["digest"] == manifest.digest
    assert found["aliases"] == ["prod"]
    assert Store(hub_home).verify() == []
    assert data("push", "--no-trial", str(directory))["digest"] == manifest.digest


def test_data_on_stdout_chatter_on_stderr(packed) -> None:
    result = ok("push", "--no-trial", str(packed()[0]))
    assert result.stdout == ""
    assert "acme/tone@1.0.0" in result.stderr
    assert ok("list").stdout.splitlines()[1].split()[:2] == ["acme/tone", "1.0.0"]


def test_push_a_foreign_directory_with_facts(hub_home: Path, files, base_identity, tmp_path: Path) -> None:
    directory = files()
    result = run("push", "--no-trial", str(directory))
    assert result.exit_code == 2
    assert "--name, --version, --base" in result.stderr  # the kind is in its PEFT config
    assert not (directory / "module.json").exists()
    (tmp_path / "base.json").write_text(base_identity.model_dump_json())
    facts = ["--name", "acme/tone", "--version", "1.0", "--base", str(tmp_path / "base.json"), "--license", "MIT"]
    ok("push", "--no-trial", str(directory), *facts, "--label", "yes", "--label", "no", "--summary", "A tone")
    manifest = Store(hub_home).get("acme/tone").manifest
    assert manifest.kind == "lora"
    assert manifest.labels == ("yes", "no")
    assert manifest.base == base_identity
    assert manifest.hyperparameters["lora_alpha"] == 8


def test_a_foreign_directory_is_found_again_at_its_next_push(
    hub_home: Path, files, base_identity, tmp_path: Path
) -> None:
    directory = files()
    before = sorted(path.name for path in directory.iterdir())
    (tmp_path / "base.json").write_text(base_identity.model_dump_json())
    facts = ["--name", "acme/tone", "--base", str(tmp_path / "base.json"), "--license", "MIT", "--label", "yes"]
    ok("push", "--no-trial", str(directory), *facts, "--version", "1.0", "--summary", "A tone")
    (directory / "README.md").write_text("# better\n")
    result = run("push", "--no-trial", str(directory), "--bump", "auto", "--summary", "A better tone")
    assert f"as at the last push of {directory}: name acme/tone, base {base_identity.repo}" in result.stderr
    manifest = Store(hub_home).get("acme/tone").manifest
    assert (manifest.version, manifest.license, manifest.labels) == ("1.0.1", "MIT", ("yes",))
    assert (manifest.base, manifest.summary) == (base_identity, "A better tone")
    assert data("push", "--no-trial", str(directory), "--version", "2.0")["ref"] == "acme/tone@2.0"
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/other"}))
    result = run("push", "--no-trial", str(directory), "--bump", "minor")
    assert result.exit_code == 0
    assert (
        f"names the base org/other, and not {base_identity.repo}" in result.stderr
    )  # the folder may be of another now
    # Nothing is guessed for another name, nor of a folder that never was pushed; and nothing was written there.
    result = run("push", "--no-trial", str(directory), "--name", "acme/other", "--bump", "auto")
    assert result.exit_code == 2
    assert "--base" in result.stderr
    assert sorted({*(path.name for path in directory.iterdir())} - {"README.md"}) == sorted({*before} - {"README.md"})


def test_a_hint_for_what_is_packed_is_for_that_alone(files, packed, base_identity, tmp_path: Path) -> None:
    """What is refused of an import or of a foreign folder cannot be packed again."""
    broken = files()
    (broken / "adapter_config.json").write_text("[]")
    (tmp_path / "base.json").write_text(base_identity.model_dump_json())
    facts = ["--name", "acme/tone", "--version", "1.0", "--base", str(tmp_path / "base.json")]
    for words in (("push", str(broken), *facts), ("import", str(broken), *facts)):
        result = run(*words)
        assert result.exit_code == 1
        assert "is not a JSON object" in result.stderr
        assert "--repack" not in result.stderr
    (broken / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    (broken / "adapter_model.safetensors").write_bytes(b"no tensors")
    for words in (("push", "--no-trial", str(broken), *facts), ("import", str(broken), *facts)):
        result = run(*words)
        assert result.exit_code == 1
        assert "--repack" not in result.stderr
        assert "hint: " in result.stderr
    own, _ = packed()
    (own / "adapter_model.safetensors").write_bytes(b"no tensors")
    result = run("push", "--no-trial", str(own), "--repack", "--version", "9.0")
    assert result.exit_code == 1
    assert f"hub push {own} --repack --version NEW" in result.stderr


@pytest.mark.parametrize(
    ("stated", "kept"),
    [
        ("org/base-7b", "org/base-7b"),
        ("gpt2", "gpt2"),
        ("builtin:tiny-lm", "builtin:tiny-lm"),
        ("/home/me/models/base", "builtin:tiny-lm"),
        ("./base", "builtin:tiny-lm"),
        ("../base", "builtin:tiny-lm"),
        ("C:\\models\\base", "builtin:tiny-lm"),
        ("models/base", "builtin:tiny-lm"),  # there is such a directory
        (None, None),
    ],
)
def test_no_path_of_this_machine_is_published(
    hub_home: Path, files, base_identity, tmp_path: Path, monkeypatch, stated: str | None, kept: str | None
) -> None:
    directory = files()
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": stated}))
    (tmp_path / "models" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.json").write_text(base_identity.model_dump_json())
    ok("push", "--no-trial", str(directory), "--name", "acme/tone", "--version", "1.0", "--base", "base.json")
    assert Store(hub_home).get("acme/tone").manifest.hyperparameters.get("base_model_name_or_path") == kept


def test_list_and_search_take_the_same_filters() -> None:
    def of(command: str) -> set[str]:
        return {option.name for option in load(f"hub.commands.{command}").params if isinstance(option, click.Option)}

    own = {"as_json", "limit", "newest", "yanked", "sort", "ascending", "all_versions"}
    assert of("list:list_") - own == of("search:search") - own >= {"base", "task", "metric", "alias", "namespace"}


def test_repack(packed) -> None:
    directory, _ = packed()
    ok("push", "--no-trial", str(directory))
    (directory / "README.md").write_text("better")
    result = run("push", "--no-trial", str(directory))
    assert result.exit_code == 1
    assert "README.md is not the file that was packed" in result.stderr
    assert "--repack" in result.stderr
    assert run("push", "--no-trial", str(directory), "--repack").exit_code == 1  # 1.0.0 is published
    assert run("push", "--no-trial", str(directory), "--version", "1.1").exit_code == 2  # facts need --repack
    assert data("push", "--no-trial", str(directory), "--repack", "--version", "1.1")["version"] == "1.1"


def test_push_to_and_pull_from(pushed: Path, tmp_path: Path, monkeypatch) -> None:
    remote = str(tmp_path / "share")
    assert data("push", "acme/tone@1.0.0", "--to", remote)["to"] == remote
    ok("push", "--no-trial", str(pushed), "--to", remote)  # a directory: into the store, and on to the remote
    monkeypatch.setenv("HUB_HOME", str(tmp_path / "other"))
    out = tmp_path / "out"
    found = data("pull", "acme/tone>=1,<1.1", "--from", remote, "--out", str(out))
    assert (found["ref"], found["out"]) == ("acme/tone@1.0.0", str(out))
    assert (out / "adapter_model.safetensors").exists()
    assert data("pull", "acme/tone", "--from", remote)["version"] == "1.1.0"
    assert len(data("list")) == 2
    ok("verify")


def test_pull_out_of_the_store(pushed: Path, tmp_path: Path) -> None:
    ok("pull", "acme/tone@1.0.0", "--out", str(tmp_path / "out"))
    ok("verify", str(tmp_path / "out"))
    result = run("pull", "acme/tone@1.1.0", "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "holds other files" in result.stderr
    assert run("pull", "acme/tone").exit_code == 2


def test_list(pushed: Path) -> None:
    assert [a["version"] for a in data("list")] == ["1.0.0", "1.1.0"]
    assert [a["version"] for a in data("list", "--newest")] == ["1.1.0"]
    assert [a["version"] for a in data("list", "--task", "chat")] == ["1.0.0"]
    assert data("list", "other/*") == []
    result = ok("list", "--kind", "ia3")
    assert result.stdout == ""
    assert "fits" in result.stderr


def test_list_of_an_empty_store(hub_home: Path) -> None:
    assert data("list") == []
    assert "hub push" in ok("list").stderr
    assert not hub_home.exists()


def test_show(pushed: Path, packed) -> None:
    metric = {"dataset": "sst2", "metric": "accuracy", "value": 0.912, "sd": 0.01, "n": 872, "seeds": (1, 2)}
    directory, manifest = packed("acme/full@1.0", metrics=(metric,), summary="Speaks calmly.", labels=("a", "b"))
    ok("push", "--no-trial", str(directory))
    text = ok("show", "acme/full", "--tensors").stdout
    for word in ("acme/full@1.0", "Speaks calmly.", manifest.digest, "a, b", "0.912 ± 0.01", "872", "lora_A.weight"):
        assert word in text
    found = data("show", "acme/full")
    assert found["digest"] == manifest.digest
    assert found["manifest"] == json.loads(manifest.model_dump_json())


def test_verify_reports_and_fails(hub_home: Path, pushed: Path) -> None:
    assert data("verify") == {"checked": f"the store {hub_home}", "ok": True, "problems": []}
    assert data("verify", "acme/tone@1.0.0")["ok"]
    store = Store(hub_home)
    path = store.blobs.path(store.get("acme/tone@1.0.0").manifest.file("adapter_model.safetensors").digest)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])
    result = run("verify", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["problems"][0]["about"] == "acme/tone@1.0.0"
    assert run("verify", "acme/tone@1.0.0").exit_code == 1
    assert run("verify", "acme/tone@1.1.0").exit_code == 0
    (pushed / "README.md").write_text("changed")
    result = run("verify", str(pushed))
    assert result.exit_code == 1
    assert "README.md" in result.stdout


def test_tag_and_untag(pushed: Path) -> None:
    assert data("tag", "acme/tone@1.0.0", "prod", "--expect", "absent")["aliases"] == ["prod"]
    assert run("tag", "acme/tone@1.1.0", "prod", "--expect", "1.1.0").exit_code == 1
    assert data("tag", "acme/tone@1.1.0", "@prod", "--expect", "1.0.0")["version"] == "1.1.0"
    assert [(row["alias"], row["version"]) for row in data("tag", "acme/tone")] == [("prod", "1.1.0")]
    assert "prod" in ok("tag", "acme/tone").stdout
    assert data("show", "acme/tone@prod")["version"] == "1.1.0"
    assert data("untag", "acme/tone@prod")["alias"] == "prod"
    assert data("tag", "acme/tone") == []
    assert run("untag", "acme/tone@prod").exit_code == 1
    assert run("untag", "acme/tone@1.0.0").exit_code == 2
    assert run("tag", "acme/tone", "--expect", "1.0").exit_code == 2
    assert run("tag", "acme/nobody").exit_code == 1


def test_yank_and_back(pushed: Path) -> None:
    assert data("yank", "acme/tone@1.1.0", "--reason", "leaks")["yanked"] == "leaks"
    assert data("show", "acme/tone")["version"] == "1.0.0"
    assert "leaks" in ok("show", "acme/tone@1.1.0").stdout
    assert data("yank", "acme/tone@1.1.0", "--undo")["yanked"] is None
    assert data("show", "acme/tone")["version"] == "1.1.0"
    assert run("yank", "acme/tone", "--reason", "x").exit_code == 2
    assert run("yank", "acme/tone@1.0.0").exit_code == 2


def test_warnings_are_shown(files, base_identity, tmp_path: Path) -> None:
    import numpy as np

    tensors = {"x.lora_A.weight": np.ones((2, 2), np.float32), "x.lora_B.weight": np.zeros((2, 2), np.float32)}
    (tmp_path / "base.json").write_text(base_identity.model_dump_json())
    facts = ["--name", "zero", "--version", "1.0", "--base", str(tmp_path / "base.json")]
    result = ok("push", "--no-trial", str(files(tensors=tensors)), *facts)
    assert "warning: local/zero@1.0: every lora_B is all zero" in result.stderr
    assert "lora_B is all zero" in ok("show", "zero").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["lst"], 2, "did you mean list?"),
        (["xyzzy"], 2, "`hub --help` lists all commands"),
        (["show", "acme/tonne"], 1, "did you mean acme/tone?"),
        (["show", "acme/tone@9"], 1, "there are 1.0.0, 1.1.0"),
        (["show", "Acme_/Tone"], 2, "is not a namespace"),
        (["show"], 2, "Missing argument"),
        (["list", "--knd", "x"], 2, "--kind"),
        (["push", "./absent"], 1, "is not a directory"),
        (["push", "acme/tone"], 2, "is published already"),
        (["push", "acme/tone", "--version", "2"], 2, "immutable"),
        (["pull", "acme/tone", "--from", "gopher://x"], 2, "there is no remote"),
        (["pull", "acme/absent", "--from", "/nowhere/at/all"], 1, "there is no adapter acme/absent"),
        (["tag", "acme/tone", "1.0"], 2, "neither a version nor an alias"),
        (["tag", "acme/tone", "latest"], 2, "computed"),
    ],
)
def test_errors_end_in_the_next_step(pushed: Path, arguments: list[str], code: int, words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == code
    assert words in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_exit_codes_of_the_real_process(hub_home: Path, packed) -> None:
    def hub(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hub", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)

    done = hub("push", "--no-trial", str(packed()[0]), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["ref"] == "acme/tone@1.0.0"
    failed = hub("show", "acme/tonne")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == (
        f"error: there is no adapter acme/tonne in the store {hub_home}\nhint: did you mean acme/tone?\n"
    )
    assert hub("shw", "x").returncode == 2
    assert hub("--help").returncode == 0
    assert hub("--version").stdout.startswith("moduloom")


def test_a_closed_pipe_is_no_traceback(pushed: Path) -> None:
    command = f"{sys.executable} -m hub show acme/tone --tensors | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=dict(os.environ), check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 1)


OURS = [(name, row) for rows in COMMANDS.values() for name, row in rows.items() if row.target.startswith("hub.")]


@pytest.mark.parametrize(("name", "row"), OURS)
def test_every_row_of_the_table_is_a_command(name: str, row) -> None:
    command = load(row.target)
    assert command.name == name
    assert f"  {name} " in ok("--help").stdout
    parts = [(name, part) for part in command.commands] if isinstance(command, click.Group) else [(name,)]
    text = "".join(ok(*part, "--help").stdout for part in parts)
    assert text.count("--json") >= len(parts) or name == "registry"  # a server's answer is what it serves
    assert command.help.strip()


def test_every_row_of_the_error_table_is_a_class() -> None:
    for name in ERRORS:
        module, _, cls = name.rpartition(".")
        if module.partition(".")[0] in ("hub", "compose", "train", "builtins", "sqlite3"):
            assert issubclass(load(f"{module}:{cls}"), BaseException)


def test_a_defect_keeps_its_traceback(monkeypatch) -> None:
    monkeypatch.setattr("hub.store.Store.list", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("list")


def test_our_warnings_are_sentences_and_a_library_s_keep_their_place(capsys: pytest.CaptureFixture[str]) -> None:
    from compose.base.compatibility import BaseWarning
    from hub.cli import _warn

    _warn("the base is held as none", BaseWarning, "api.py", 7)
    assert capsys.readouterr().err == "warning: the base is held as none\n"
    _warn("old", DeprecationWarning, "theirs.py", 7)
    assert "theirs.py:7: DeprecationWarning: old" in capsys.readouterr().err


HOME = Path(__file__).parents[2]
TARGETS = {
    target[1]: str(file.relative_to(HOME))
    for package in ("hub", "compose", "router", "train")
    for file in sorted((HOME / package).rglob("*.py"))
    for target in re.finditer(r'"((?:hub|compose|router|train)(?:\.\w+)+:\w+)"', file.read_text("utf-8"))
}


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_what_a_text_names_is_there(target: str) -> None:
    """What is imported by its name when it is needed: no import checks those."""
    assert load(target) is not None, TARGETS[target]


def test_other_words_than_a_command_takes_end_in_an_example(files) -> None:
    result = run("import", str(files()), "acme/tone")
    assert result.exit_code == 2
    assert "for example: hub import ./peft --name acme/tone --version 1.0.0 --base builtin:tiny-lm" in result.stderr
    assert "--key author.pem" in run("sign", "acme/tone").stderr


def test_an_expression_that_begins_with_a_minus_is_no_option(tmp_path: Path) -> None:
    """It is read, and ends at the adapter that is not there: not at click's "no such option"."""
    for words in (["compose", "check", "-1 * acme/tone"], ["compose", "-0.5*acme/tone", "-o", "acme/minus@1.0"]):
        result = run(*words)
        assert "acme/tone" in result.stderr
        assert "option" not in result.stderr


def test_keys_are_explained_where_one_is_missing(hub_home: Path, packed) -> None:
    pytest.importorskip("model_signing", reason="the extra `sign` is not installed")
    Store(hub_home).put(packed()[0])
    result = run("sign", "acme/tone", "--key", "none.pem")
    assert result.exit_code == 1
    assert "openssl ecparam -name prime256v1" in result.stderr
    help_text = run("sign", "--help").stdout
    assert "openssl ecparam" in help_text
    assert "moduloom[sign]" in help_text
