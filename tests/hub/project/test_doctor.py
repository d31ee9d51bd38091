"""`hub doctor`: a healthy machine, and each problem with what to do."""

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hub.cli import main
from hub.project import doctor
from hub.store import Store


def run(*words: str) -> Result:
    return CliRunner().invoke(main, list(words), catch_exceptions=False)


@pytest.fixture
def store(hub_home: Path, packed) -> Store:
    store = Store(hub_home)
    store.put(packed()[0])
    return store


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch):
    """Findings that are broken; torch is left out, as it takes seconds."""
    monkeypatch.setitem(doctor.CHECKS, "machine", lambda store: iter(()))

    def look(store: Store) -> list[str]:
        found = [finding for finding in doctor.examine(store) if finding.level == "broken"]
        assert all(finding.hint for finding in found)
        return [finding.message for finding in found]

    return look


def test_a_healthy_machine(store: Store, tmp_path: Path) -> None:
    assert run("remote", "add", "team", str(tmp_path / "team")).exit_code == 0
    result = run("doctor", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0, report
    assert report["ok"]
    text = " ".join(finding["message"] for finding in report["findings"])
    for word in ("Python", "torch", "nf4 works", "1 artifacts", "all files are there", "team"):
        assert word in text
    shown = run("doctor", "--offline")
    assert "all is well" in shown.stderr
    assert "team" not in shown.stdout


def test_an_empty_home_is_not_broken(tmp_path: Path, broken) -> None:
    assert broken(Store(tmp_path / "nowhere")) == []
    assert not (tmp_path / "nowhere").exists()


def test_lost_blobs(store: Store, broken) -> None:
    entry = store.get("acme/tone").manifest.files[0]
    store.blobs.path(entry.digest).unlink()
    assert any(entry.path in message for message in broken(store))


def test_a_lost_manifest(store: Store, broken) -> None:
    path = store.blobs.path(store.get("acme/tone").digest)
    path.chmod(0o644)
    path.write_bytes(b"{}")
    assert broken(store)


def test_modes_disks_and_logs(store: Store, broken, monkeypatch: pytest.MonkeyPatch) -> None:
    store.root.chmod(0o777)
    assert any("everybody" in message for message in broken(store))
    store.root.chmod(0o755)
    usage = shutil.disk_usage(store.root)._replace(free=2**20)
    monkeypatch.setattr("hub.project.doctor.shutil.disk_usage", lambda path: usage)
    assert broken(store) == ["1.0 MiB free where the store is"]
    log = store.root / "log.jsonl"
    log.write_bytes(log.read_bytes().replace(b"acme", b"ecma"))
    assert len(broken(Store(store.root))) >= 2


def test_remotes_that_do_not_answer(store: Store, broken) -> None:
    (store.root / "remotes.json").write_text('{"gone": "nosuch://x"}')
    assert any("gone (nosuch://x)" in message for message in broken(store))
    (store.root / "remotes.json").write_text("[]")
    assert any("remotes.json" in message for message in broken(store))


def test_broken_plugins(store: Store, broken, plugin_package, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its package, its target and its error; so is an entry point in a group that nobody reads."""
    folder = plugin_package("hub.doctored", entry="star = acme_star.widget")
    monkeypatch.setitem(doctor._PLUGINS, "hub.doctored", folder)
    assert broken(store) == [
        "doctored 'star' of acme-star cannot be loaded from acme_star.widget: "
        "ModuleNotFoundError: No module named 'acme_star'"
    ]
    plugin_package("hub.kind", entry="vera = acme_vera")
    (finding,) = [found for found in doctor.examine(store) if "hub.kind" in found.message]
    assert finding.message == "acme-vera adds 'vera' to the group 'hub.kind', which nothing reads"
    assert finding.hint.startswith("did you mean hub.kinds")


def test_every_sort_of_plugin_is_looked_at() -> None:
    groups = set()
    for package in ("hub", "compose", "router", "train"):
        for path in (Path(doctor.__file__).parents[2] / package).rglob("*.py"):
            groups |= set(re.findall(r'group="(hub\.\w+)"', path.read_text()))
            groups |= set(re.findall(r'discover\("[\w.]+", "(hub\.\w+)"\)', path.read_text()))
    assert {"hub.gates", "hub.remotes"} < groups <= doctor._PLUGINS.keys()


def test_packages_that_do_not_import(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hub.project.doctor._TORCH", "no_such_package:findings")
    result = run("doctor")
    assert result.exit_code == 1
    assert "cannot be imported: No module named 'no_such_package'" in result.stdout
    assert "-> install it again" in result.stdout
    assert "1 problem" in result.stderr
