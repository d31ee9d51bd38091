"""Full disks, read-only disks, no permission: a StoreError with a hint, and a store that still verifies."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

import hub
from hub.errors import NotFound, StoreError
from hub.project.gc import collect, plan
from hub.project.named_remotes import Remotes
from hub.remotes import from_url
from hub.store import Store
from hub.transfer import pull, push

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(hub.__file__).parents[1])}  # scripts find hub uninstalled
JOB = Path(__file__).with_name("disk_job.py")


def run(job: str, store: Path, source: Path | str, *options: str) -> dict[str, object]:
    command = [sys.executable, str(JOB), job, str(store), str(source), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, whose size and mode can be changed."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(directory)):
        pytest.skip("mounting a tmpfs needs root")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


def resize(disk: Path, options: str) -> None:
    assert mount("-o", f"remount,{options}", str(disk))


SIZES = (16, 24, 128, 320, 352, 384, 416, 448, 512, 1024)  # KiB; 300 of them are the weights


@pytest.mark.parametrize("job", ["put", "pull", "push"])
def test_a_full_disk(disk: Path, store: Store, victim, job: str) -> None:
    """Disks of all sizes around what is needed, so that each step that writes meets the end once."""
    directory, outcomes, place = victim(size=300_000), set(), disk / "store"
    artifact = store.put(directory)
    jobs = {
        "put": lambda: Store(place).put(directory),
        "pull": lambda: pull(Store(place), from_url(str(store.root)), "acme/tone"),
        "push": lambda: push(store, from_url(str(place)), "acme/tone"),
    }
    for size in SIZES:
        shutil.rmtree(place, ignore_errors=True)
        resize(disk, f"size={size}k")
        try:
            jobs[job]()
            outcomes.add("done")
        except StoreError as error:
            assert error.hint
            outcomes.add("full")
        resize(disk, "size=4m")
        assert Store(place).verify() == []
        jobs[job]()  # the next run, with room, completes
        assert Store(place).verify() == []
        assert Store(place).get("acme/tone") == artifact
        assert [path for path in (place / "tmp").iterdir() if not path.name.startswith(".")] == []
    assert outcomes == {"full", "done"}


def test_a_full_disk_at_materialize_and_pack(disk: Path, store: Store, victim) -> None:
    artifact = store.put(victim(size=300_000))
    with pytest.raises(OSError, match="No space"):
        artifact.materialize(disk / "out")
    assert list(disk.iterdir()) == []
    resize(disk, "size=4m")
    artifact.materialize(disk / "out")


def test_a_read_only_store_can_be_read(disk: Path, victim, tmp_path: Path) -> None:
    resize(disk, "size=8m")
    writable = Store(disk / "store")
    artifact = writable.put(victim())
    writable.tag("acme/tone", "prod")
    push(writable, from_url(str(disk / "remote")), "acme/tone")
    resize(disk, "ro")
    store = Store(disk / "store")
    assert store.get("acme/tone@prod") == artifact
    assert [str(a.ref) for a in store.list()] == ["acme/tone@1.0.0"]
    assert store.verify() == []
    artifact.materialize(tmp_path / "out")
    other = victim("acme/other@1.0.0")
    for write in (
        lambda: store.put(other),
        lambda: store.tag("acme/tone", "dev"),
        lambda: store.untag("acme/tone", "prod"),
        lambda: pull(store, from_url(str(disk / "remote")), "acme/tone"),
        lambda: store.rebuild_index(),
        lambda: Store(disk / "new").put(other),
    ):
        with pytest.raises(StoreError, match="read-only") as caught:
            write()
        assert "HUB_HOME" in caught.value.hint
    assert pull(Store(tmp_path / "mine"), from_url(str(disk / "remote")), "acme/tone") == artifact


@pytest.mark.parametrize("harm", ["removed", "behind", "garbage"])
def test_a_read_only_store_with_a_bad_index(disk: Path, victim, harm: str, tmp_path: Path, monkeypatch) -> None:
    """It is answered from memory, in threads too: nothing is left anywhere, however the process ends."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    resize(disk, "size=8m")
    store = Store(disk / "store")
    store.put(victim())
    early = (store.root / "index.sqlite").read_bytes()
    later = store.put(victim("acme/tone@2.0.0", seed=1))
    if harm == "removed":
        (store.root / "index.sqlite").unlink()
    else:
        (store.root / "index.sqlite").write_bytes(early if harm == "behind" else b"garbage" * 999)
    resize(disk, "ro")
    fresh = Store(disk / "store")
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: fresh.get("acme/tone"), range(32))) == [later] * 32
    assert len(fresh.list()) == 2
    assert list(temporary.iterdir()) == []


def test_an_empty_read_only_place(disk: Path) -> None:
    resize(disk, "ro")
    store = Store(disk / "store")
    assert store.list() == []
    with pytest.raises(NotFound):
        store.get("acme/tone")


def test_changes_and_collection_on_a_full_disk(disk: Path, victim) -> None:
    """A change happens or does not; and a collection, which is what one runs then, needs no room."""
    resize(disk, "size=8m")
    store = Store(disk / "store")
    for version in ("1.0.0", "1.1.0"):
        store.put(victim(f"acme/tone@{version}", seed=int(version[2]), size=200_000))
    store.delete("acme/tone@1.0.0", "wrong")
    remotes = Remotes(disk / "store")
    remotes.add("team", "memory://x")
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    more = victim("acme/more@1.0.0", size=50_000)
    log, names = store.ledger.path.read_bytes(), remotes.path.read_bytes()
    for change in (
        lambda: store.yank("acme/tone@1.1.0", "x" * 5000),
        lambda: store.delete("acme/tone@1.1.0", "x" * 5000),
        lambda: store.tag("acme/tone@1.1.0", "a" * 90),
        lambda: remotes.add("other", "memory://" + "x" * 5000),
        lambda: store.put(more),
    ):
        try:
            change()
        except StoreError as error:
            assert error.hint
            assert "full" in error.message
        assert Store(disk / "store").verify() == []
    assert store.ledger.path.read_bytes().startswith(log)
    assert json.loads(remotes.path.read_bytes()).items() >= json.loads(names).items()
    assert collect(store, plan(store, grace=0), grace=0) > 200_000
    assert store.verify() == []
    assert str(store.put(more).ref) == "acme/more@1.0.0"


LIMITS = [0, 20, 200, 700, 4000, 40_000, 60_000, 150_000]


def test_a_file_size_limit(victim, tmp_path: Path) -> None:
    """Every step that writes meets the limit once: layout, blobs, manifest, log, index."""
    directory, outcomes = victim(size=50_000), []
    for limit in LIMITS:
        place = tmp_path / f"limit-{limit}"
        found = run("put", place, directory, "--file-limit", str(limit))
        outcomes.append("ok" in found)
        if "ok" not in found:
            assert found["error"] == "StoreError", found
        store = Store(place)
        assert store.verify() == []
        assert str(store.put(directory).ref) == "acme/tone@1.0.0"  # the next run completes
        assert store.verify() == []
    assert not outcomes[0]
    assert outcomes[-1]


@pytest.fixture
def public(monkeypatch) -> Iterator[Path]:
    """A directory that other users can reach (pytest's own is private)."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def test_no_permission(victim, public: Path) -> None:
    """A store of another user: it can be read, and every write says that there is no permission."""
    store = Store(public / "store")
    store.put(victim())
    for path in (store.root, *store.root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    source = public / "other"
    Store(store.root).get("acme/tone").materialize(source)
    source.chmod(0o755)
    assert run("list", store.root, "-", "--as-nobody") == {"ok": True, "refs": ["acme/tone@1.0.0"]}
    writes = [("tag", "acme/tone"), ("yank", "acme/tone"), ("delete", "acme/tone"), ("gc", "-"), ("put", str(source))]
    for job, argument in writes:
        found = run(job, store.root, argument, "--as-nobody")
        assert found["error"] == "StoreError", found
        assert "permission" in found["message"]
        assert "HUB_HOME" in found["hint"]
    closed = public / "closed"
    closed.mkdir(mode=0o555)
    found = run("put", closed / "store", source, "--as-nobody")
    assert "permission" in found["message"]


def test_home_is_a_file(victim, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("not a directory")
    store = Store(tmp_path / "store")
    with pytest.raises(StoreError):
        store.put(victim())
    assert (tmp_path / "store").read_text() == "not a directory"
