"""What every remote must do. A new remote is tested by one more entry in `PLACES`."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from hub.errors import Conflict, GateError, HubError, IntegrityError, NotFound, UsageError
from hub.remotes import from_url
from hub.remotes.base import REMOTES
from hub.storage.signatures import MAX_KEYS, MAX_SIGNATURE
from hub.store import Store
from hub.transfer import pull, push


@contextmanager
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Our own registry on loopback, with the stock client in this process."""
    pytest.importorskip("fastapi", reason="the extra `server` is not installed")
    uvicorn = pytest.importorskip("uvicorn", reason="the extra `server` is not installed")
    from huggingface_hub import constants

    from hub.registry.app import create_app

    # The client reads its environment once, and other tests have imported it offline.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    server = uvicorn.Server(uvicorn.Config(create_app(Store(tmp_path / "remote")), log_level="error"))
    # With the protocol named, asyncio switches Nagle's algorithm off: 40 ms a request otherwise.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"hf+http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)


@contextmanager
def memory(tmp_path: Path) -> Iterator[str]:
    fs = pytest.importorskip("fsspec").filesystem("memory")
    yield f"memory://{tmp_path.name}"
    fs.rm(f"/{tmp_path.name}", recursive=True) if fs.exists(f"/{tmp_path.name}") else None


PLACES = {
    "path": lambda request, tmp_path, _: nullcontext(str(tmp_path / "remote")),
    "file": lambda request, tmp_path, _: nullcontext((tmp_path / "remote").as_uri()),
    "hf+http": lambda request, tmp_path, monkeypatch: registry(tmp_path, monkeypatch),
    "memory": lambda request, tmp_path, _: memory(tmp_path),
    "s3": lambda request, tmp_path, _: nullcontext(request.getfixturevalue("s3_url")),
    "oci": lambda request, tmp_path, _: nullcontext(request.getfixturevalue("oci_url")),
}
# One class, and nothing but the endpoint or the client library differs.
ALIKE = {"hf": "hf+http", "hf+https": "hf+http", "gs": "s3", "gcs": "s3", "az": "s3", "abfs": "s3"}


def test_every_scheme_is_under_contract() -> None:
    assert {ALIKE.get(scheme, scheme) for scheme in REMOTES} <= set(PLACES)


@pytest.fixture(params=sorted(PLACES))
def url(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the remote is; directories and the registry keep their artifacts in the store `tmp_path / "remote"`."""
    with PLACES[request.param](request, tmp_path, monkeypatch) as found:
        yield found


@pytest.fixture
def second(tmp_path: Path) -> Store:
    return Store(tmp_path / "second")


def test_an_empty_remote(url: str, second: Store) -> None:
    remote = from_url(url)
    assert remote.names() == []
    assert remote.catalogue("acme/tone").releases == ()
    with pytest.raises(NotFound, match="there is no adapter acme/tone") as caught:
        pull(second, remote, "acme/tone")
    assert f"hub push acme/tone --to {remote.url}" in caught.value.hint
    assert second.list() == []


def test_push_then_pull_gives_the_same_artifact(url: str, store: Store, second: Store, publish, tmp_path: Path) -> None:
    artifact = publish("acme/tone@1.0.0")
    assert push(store, from_url(url), "acme/tone") == artifact
    remote = from_url(url)
    assert remote.names() == ["acme/tone"]
    assert [release.version for release in remote.catalogue("acme/tone").releases] == ["1.0.0"]
    pulled = pull(second, remote, "acme/tone@1.0.0")
    assert pulled == artifact
    assert pulled.manifest == artifact.manifest
    assert second.verify() == []
    one, two = artifact.materialize(tmp_path / "one"), pulled.materialize(tmp_path / "two")
    for name in (*artifact.files, "module.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_pushing_and_pulling_again_is_a_no_op(url: str, store: Store, second: Store, publish) -> None:
    artifact = publish()
    totals = []

    def progress(label, total):
        totals.append(total)
        return lambda count: None

    for _ in range(2):
        push(store, from_url(url), "acme/tone", progress=progress)
    for _ in range(2):
        pull(second, from_url(url), "acme/tone", progress=progress)
    assert totals == [artifact.manifest.size, 0, artifact.manifest.size, 0]
    assert len(from_url(url).catalogue("acme/tone").releases) == 1


def test_names_are_compared_without_case(url: str, store: Store, second: Store, publish, packed) -> None:
    """On the Hub accounts and repositories have capitals; whoever writes them otherwise means the same adapter."""
    one = publish("Acme/Tone@1.0.0")
    push(store, from_url(url), "acme/tone")
    store.tag("ACME/tone@1.0.0", "prod")
    push(store, from_url(url), "acme/TONE@prod")
    publish("acme/tone@1.1.0")
    push(store, from_url(url), "Acme/Tone@1.1.0")
    remote = from_url(url)
    assert [name.lower() for name in remote.names()] == ["acme/tone"]
    for name in ("Acme/Tone", "acme/tone"):
        catalogue = remote.catalogue(name)
        assert [release.version for release in catalogue.releases] == ["1.0.0", "1.1.0"]
        assert catalogue.aliases == {"prod": one.digest}
    pulled = pull(second, remote, "acme/tone@prod")
    assert (pulled.digest, str(pulled.ref)) == (one.digest, "Acme/Tone@1.0.0")  # shown as it was written
    assert str(pull(second, remote, "ACME/TONE").ref) == "acme/tone@1.1.0"
    assert second.verify() == []
    third = Store(second.root.parent / "third")
    third.put(packed("ACME/Tone@1.0.0", summary="other")[0])
    with pytest.raises(Conflict):
        push(third, from_url(url), "acme/tone")


def test_only_what_is_missing_travels(url: str, store: Store, packed) -> None:
    # The second version has the same weights and card, and another config.
    directory, _ = packed("acme/tone@1.0.0")
    store.put(directory)
    push(store, from_url(url), "acme/tone")
    from hub.manifest import Draft
    from hub.pack import pack

    (directory / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 16}')
    pack(directory, Draft(name="acme/tone", version="1.1.0", kind="lora"))
    manifest = store.put(directory).manifest
    assert [entry.path for entry in from_url(url).missing(manifest)] == ["adapter_config.json"]


def test_progress_adds_up(url: str, store: Store, second: Store, publish) -> None:
    artifact = publish()
    counted = []

    def progress(label, total):
        assert total == artifact.manifest.size
        return counted.append

    push(store, from_url(url), "acme/tone", progress=progress)
    assert sum(counted) == artifact.manifest.size
    counted.clear()
    pull(second, from_url(url), "acme/tone", progress=progress)
    assert sum(counted) == artifact.manifest.size


def test_immutable(url: str, store: Store, tmp_path: Path, packed) -> None:
    store.put(packed(seed=0)[0])
    push(store, from_url(url), "acme/tone")
    other = Store(tmp_path / "other")
    other.put(packed(seed=1)[0])
    with pytest.raises(Conflict):
        push(other, from_url(url), "acme/tone")
    with pytest.raises(Conflict):
        pull(other, from_url(url), "acme/tone")
    with pytest.raises(Conflict):
        from_url(url).publish(other.get("acme/tone").manifest)
    assert from_url(url).catalogue("acme/tone").releases[0].digest == store.get("acme/tone").digest


def test_the_manifest_goes_last(url: str, store: Store, publish) -> None:
    manifest = publish().manifest
    remote = from_url(url)
    with pytest.raises(HubError):
        remote.publish(manifest)  # its blobs are not there
    assert remote.catalogue("acme/tone").releases == ()


def test_an_alias_travels_with_its_ref(url: str, store: Store, second: Store, publish) -> None:
    publish("acme/tone@1.0")
    publish("acme/tone@2.0", seed=1)
    store.tag("acme/tone@1.0", "prod")
    push(store, from_url(url), "acme/tone@prod")
    push(store, from_url(url), "acme/tone@latest")
    catalogue = from_url(url).catalogue("acme/tone")
    assert catalogue.aliases == {"prod": store.get("acme/tone@1.0").digest}
    assert pull(second, from_url(url), "acme/tone@prod").ref.version == "1.0"
    assert second.get("acme/tone@prod").ref.version == "1.0"
    assert pull(second, from_url(url), "acme/tone").ref.version == "2.0"
    from_url(url).tag("acme/tone", "prod", store.get("acme/tone@2.0").digest)
    assert from_url(url).catalogue("acme/tone").aliases == {"prod": store.get("acme/tone@2.0").digest}


def test_requirements_travel_first(url: str, store: Store, second: Store, publish, tmp_path: Path) -> None:
    publish("acme/a@1.0")
    member = publish("acme/b@1.5", seed=1)
    publish(
        "acme/both@1.0",
        seed=2,
        type="composition",
        expression="acme/a + acme/b",
        requires=({"name": "acme/a", "range": ">=1,<2"}, {"name": "acme/b", "digest": member.digest}),
    )
    push(store, from_url(url), "acme/both")
    assert from_url(url).names() == ["acme/a", "acme/b", "acme/both"]
    pull(second, from_url(url), "acme/both")
    assert second.names() == ["acme/a", "acme/b", "acme/both"]
    third = Store(tmp_path / "third")
    pull(third, from_url(url), "acme/both", requires=False)
    assert third.names() == ["acme/both"]


def test_cycles_end_in_an_error(url: str, store: Store, publish) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        publish(
            f"acme/{name}@1.0", type="composition", expression=f"acme/{other}", requires=({"name": f"acme/{other}"},)
        )
    with pytest.raises(GateError, match="requires itself"):
        push(store, from_url(url), "acme/a")


def test_a_missing_requirement_is_named(url: str, store: Store, publish) -> None:
    publish("acme/c@1.0", type="composition", expression="acme/gone", requires=({"name": "acme/gone"},))
    with pytest.raises(NotFound, match="acme/gone"):
        push(store, from_url(url), "acme/c")
    assert from_url(url).names() == []


def test_did_you_mean_over_the_wire(url: str, store: Store, second: Store, publish) -> None:
    publish()
    push(store, from_url(url), "acme/tone")
    with pytest.raises(NotFound) as caught:
        pull(second, from_url(url), "acme/tune")
    assert caught.value.hint == "did you mean acme/tone?"
    with pytest.raises(NotFound) as caught:
        pull(second, from_url(url), "acme/tone@7.0")
    assert "1.0.0" in caught.value.hint


class Altered:
    """A remote whose answers are changed on the way: what a broken or hostile place would send."""

    def __init__(self, remote, *, read=None, manifest=None):
        self._remote, self._read, self._manifest = remote, read, manifest

    def __getattr__(self, name):
        return getattr(self._remote, name)

    def read(self, manifest, entry, offset):
        data = b"".join(self._remote.read(manifest, entry, offset))
        return self._read(data, entry, offset) if self._read else [data]

    def manifest(self, name, digest):
        data = self._remote.manifest(name, digest)
        return self._manifest(data) if self._manifest else data


@pytest.mark.parametrize(
    "read",
    [
        lambda data, entry, offset: [data[:-1], bytes([data[-1] ^ 1])],
        lambda data, entry, offset: [data[:-1]],
        lambda data, entry, offset: [data, b"x"],
        lambda data, entry, offset: [],
        lambda data, entry, offset: [bytes(len(data))],
        lambda data, entry, offset: (b"x" * 10**6 for _ in range(10**6)),  # it would never end
    ],
)
def test_wrong_bytes_are_refused(url: str, store: Store, second: Store, publish, read) -> None:
    artifact = publish()
    push(store, from_url(url), "acme/tone")
    with pytest.raises(IntegrityError):
        pull(second, Altered(from_url(url), read=read), "acme/tone")
    assert second.list() == []
    assert second.verify() == []
    assert pull(second, from_url(url), "acme/tone") == artifact


@pytest.mark.parametrize(
    "manifest",
    [
        lambda data: data.replace(b'"lora"', b'"ia3"'),
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: json.dumps(json.loads(data), indent=1).encode(),
    ],
)
def test_a_wrong_manifest_is_refused(url: str, store: Store, second: Store, publish, manifest) -> None:
    publish()
    push(store, from_url(url), "acme/tone")
    with pytest.raises(IntegrityError):
        pull(second, Altered(from_url(url), manifest=manifest), "acme/tone")
    assert second.list() == []


def test_a_cut_pull_goes_on_where_it_stopped(url: str, store: Store, second: Store, publish) -> None:
    artifact = publish()
    push(store, from_url(url), "acme/tone")

    class Cut(Exception):
        pass

    asked = []

    def torn(data, entry, offset):
        asked.append((entry.path, offset))
        if entry.path == "adapter_model.safetensors":
            yield data[:300]
            raise Cut
        yield data

    with pytest.raises(Cut):
        pull(second, Altered(from_url(url), read=torn), "acme/tone", jobs=1)
    assert second.list() == []

    def whole(data, entry, offset):
        asked.append((entry.path, offset))
        return [data]

    asked.clear()
    assert pull(second, Altered(from_url(url), read=whole), "acme/tone") == artifact
    assert asked == [("adapter_model.safetensors", 300)]  # the smaller files are here already, and 300 bytes of it


class Meeting:
    """A remote on which each of the first blobs waits until all of them are under way; counts those at once."""

    def __init__(self, remote, parties: int):
        self._remote, self._ready, self._left = remote, threading.Barrier(parties, timeout=30), parties
        self._lock, self.now, self.most = threading.Lock(), 0, 0

    def __getattr__(self, name):
        return getattr(self._remote, name)

    @contextmanager
    def _busy(self):
        with self._lock:
            self.now, self.most, self._left = self.now + 1, max(self.most, self.now + 1), self._left - 1
            wait = self._left >= 0
        if wait:
            self._ready.wait()
        yield
        with self._lock:
            self.now -= 1

    def read(self, manifest, entry, offset):
        with self._busy():
            yield from self._remote.read(manifest, entry, offset)

    def write(self, manifest, entry, source, advance):
        with self._busy():
            self._remote.write(manifest, entry, source, advance)


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_several_blobs_move_at_once(url: str, store: Store, second: Store, publish, jobs: int) -> None:
    artifact = publish()  # of three files
    there, here = Meeting(from_url(url), jobs), Meeting(from_url(url), jobs)
    push(store, there, "acme/tone", jobs=jobs)
    assert pull(second, here, "acme/tone", jobs=jobs) == artifact
    assert (there.most, here.most) == (jobs, jobs)
    assert second.verify() == []


def test_the_first_error_stops_the_others(url: str, store: Store, second: Store, publish) -> None:
    """One blob fails while the others are half there: that error is the one told, and the halves are kept."""
    artifact = publish()
    push(store, from_url(url), "acme/tone")
    sizes = {entry.path: entry.size for entry in artifact.manifest.files}
    half, failed = threading.Barrier(len(sizes), timeout=30), threading.Event()

    def read(data, entry, offset):
        yield data[: sizes[entry.path] // 2]
        half.wait()
        if entry.path == "README.md":
            failed.set()
            raise NotFound("README.md has gone")
        failed.wait(30)
        time.sleep(0.1)  # so that the error is known when the next bytes come
        yield data[sizes[entry.path] // 2 :]

    with pytest.raises(NotFound, match="has gone"):
        pull(second, Altered(from_url(url), read=read), "acme/tone")
    assert second.list() == []
    kept = {path.name: path.stat().st_size for path in (second.root / "partial").iterdir()}
    assert kept == {entry.sha256: entry.size // 2 for entry in artifact.manifest.files}
    asked = {}

    def rest(data, entry, offset):
        asked[entry.path] = offset
        return [data]

    assert pull(second, Altered(from_url(url), read=rest), "acme/tone") == artifact
    assert asked == {path: size // 2 for path, size in sizes.items()}


def test_a_wrong_partial_blob_is_fetched_anew(url: str, store: Store, second: Store, publish) -> None:
    artifact = publish()
    push(store, from_url(url), "acme/tone")
    entry = artifact.manifest.file("adapter_model.safetensors")
    for junk in (b"junk", b"j" * entry.size, b"j" * (entry.size + 5)):
        (second.root / "partial").mkdir(parents=True, exist_ok=True)
        (second.root / "partial" / entry.sha256).write_bytes(junk)
        assert pull(second, from_url(url), "acme/tone") == artifact
        assert second.verify() == []
        second.blobs.path(entry.digest).unlink()


def test_pull_mends_a_damaged_store(url: str, store: Store, second: Store, publish) -> None:
    artifact = publish()
    push(store, from_url(url), "acme/tone")
    pull(second, from_url(url), "acme/tone")
    path = second.blobs.path(artifact.manifest.file("adapter_model.safetensors").digest)
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    assert len(second.verify()) == 1
    pull(second, from_url(url), "acme/tone")
    assert second.verify() == []


def test_damage_at_home_is_not_pushed(url: str, store: Store, publish) -> None:
    artifact = publish()
    path = store.blobs.path(artifact.manifest.file("README.md").digest)
    path.chmod(0o644)
    path.write_bytes(b"# tonE\n")
    with pytest.raises(IntegrityError, match="README"):
        push(store, from_url(url), "acme/tone")
    assert from_url(url).catalogue("acme/tone").releases == ()


def test_yanked_at_the_remote(url: str, store: Store, second: Store, publish, tmp_path: Path) -> None:
    publish("acme/tone@1.0")
    artifact = publish("acme/tone@1.1", seed=1)
    for version in ("1.0", "1.1"):
        push(store, from_url(url), f"acme/tone@{version}")

    def yank(reason: str | None) -> None:
        if url.startswith("hf"):
            with pytest.raises(UsageError, match="cannot be told to yank"):
                from_url(url).yank("acme/tone", artifact.digest, reason)
            Store(tmp_path / "remote").yank("acme/tone@1.1", reason)
        else:
            from_url(url).yank("acme/tone", artifact.digest, reason)

    yank("bad")
    release = from_url(url).catalogue("acme/tone").find(version="1.1")
    assert release.yanked == (f"withdrawn in {url}" if url.startswith("hf") else "bad")
    assert pull(second, from_url(url), "acme/tone").ref.version == "1.0"
    assert pull(second, from_url(url), "acme/tone@1.1").ref.version == "1.1"
    yank(None)
    assert from_url(url).catalogue("acme/tone").find(version="1.1").yanked is None
    assert pull(second, from_url(url), "acme/tone").ref.version == "1.1"


def test_deleted_at_the_remote(url: str, store: Store, second: Store, publish, packed) -> None:
    publish("acme/tone@1.0")
    artifact = publish("acme/tone@1.1", seed=1)
    for version in ("1.0", "1.1"):
        push(store, from_url(url), f"acme/tone@{version}")
    if url.startswith("hf"):
        with pytest.raises(UsageError, match="cannot delete a version") as caught:
            from_url(url).delete("acme/tone", artifact.digest, "leaked")
        assert "hub delete" in caught.value.hint
        return
    from_url(url).tag("acme/tone", "prod", artifact.digest)
    with pytest.raises(Conflict, match="@prod"):
        from_url(url).delete("acme/tone", artifact.digest, "leaked")
    from_url(url).tag("acme/tone", "prod", store.get("acme/tone@1.0").digest)
    from_url(url).delete("acme/tone", artifact.digest, "leaked")
    catalogue = from_url(url).catalogue("acme/tone")
    assert [release.version for release in catalogue.releases] == ["1.0"]
    [gone] = catalogue.tombstones
    assert (gone.version, gone.digest, gone.reason, gone.final) == ("1.1", artifact.digest, "leaked", True)
    assert pull(second, from_url(url), "acme/tone").ref.version == "1.0"
    with pytest.raises(NotFound, match=r"it was deleted \(leaked\)"):
        pull(second, from_url(url), "acme/tone@1.1")
    with pytest.raises(NotFound):
        from_url(url).delete("acme/tone", artifact.digest, "again")
    other = Store(second.root.parent / "other")
    other.put(packed("acme/tone@1.1", seed=2)[0])
    for writer in (store, other):  # neither the same content nor another one
        with pytest.raises(Conflict, match="a version is never used again"):
            push(writer, from_url(url), "acme/tone@1.1")


def test_signatures_travel(url: str, store: Store, second: Store, publish) -> None:
    """With the artifact, and later when it is there already; several keys; none is believed."""
    artifact = publish()
    one, two = "1" * 64, "2" * 64
    push(store, from_url(url), "acme/tone")
    assert pull(second, from_url(url), "acme/tone") == artifact
    assert second.signatures.of(artifact.digest) == {}
    store.signatures.add(artifact.digest, one, b'{"by": 1}')
    push(store, from_url(url), "acme/tone")
    pull(second, from_url(url), "acme/tone")
    assert second.signatures.of(artifact.digest) == {one: b'{"by": 1}'}
    second.signatures.add(artifact.digest, two, b'{"by": 2}')
    push(second, from_url(url), "acme/tone")
    push(store, from_url(url), "acme/tone")  # which knows of the first one alone
    pull(store, from_url(url), "acme/tone")
    assert store.signatures.of(artifact.digest) == {one: b'{"by": 1}', two: b'{"by": 2}'}
    assert [release.version for release in from_url(url).catalogue("acme/tone").releases] == ["1.0.0"]
    assert from_url(url).catalogue("acme/tone").aliases == {}


def test_what_a_remote_calls_signatures(store: Store, second: Store, publish, tmp_path: Path) -> None:
    """Names that are no keys and what is too large stay outside; what is here is not overwritten."""
    artifact, good = publish(), "a" * 64
    push(store, from_url(str(tmp_path / "remote")), "acme/tone")

    class Hostile(Altered):
        def signatures(self, name, digest):
            odd = {"../../x": b"x", "A" * 64: b"x", "b" * 64: bytes(MAX_SIGNATURE + 1), good: b"theirs"}
            return odd | {f"{i:064x}": b"x" for i in range(1000)}

    second.signatures.add(artifact.digest, good, b"mine")
    pull(second, Hostile(from_url(str(tmp_path / "remote"))), "acme/tone")
    found = second.signatures.of(artifact.digest)
    assert second.signatures.path(artifact.digest, good).read_bytes() == b"mine"
    assert len(list(second.signatures.path(artifact.digest, good).parent.iterdir())) <= MAX_KEYS + 1
    assert all(len(key) == 64 and len(data) < 10 for key, data in found.items())


def test_what_was_never_published_cannot_be_tagged(url: str, store: Store, publish) -> None:
    push(store, from_url(url), publish().ref)
    with pytest.raises(NotFound):
        from_url(url).tag("acme/tone", "prod", "sha256:" + "0" * 64)
    assert from_url(url).catalogue("acme/tone").aliases == {}


def test_two_publish_the_same_version_at_once(url: str, packed, tmp_path: Path) -> None:
    """One wins, and the other is told so, but by an OCI registry: it has no compare-and-swap, the last one wins."""
    stores = [Store(tmp_path / f"writer-{i}") for i in range(2)]
    for i, writer in enumerate(stores):
        writer.put(packed("acme/tone@1.0.0", seed=i)[0])
    outcomes: list[Exception | None] = [None, None]
    ready = threading.Barrier(2)

    def work(i: int) -> None:
        remote = from_url(url)
        ready.wait()
        try:
            push(stores[i], remote, "acme/tone")
        except HubError as error:
            outcomes[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [release] = from_url(url).catalogue("acme/tone").releases
    winner = [store.get("acme/tone").digest for store in stores].index(release.digest)
    assert outcomes[winner] is None
    assert isinstance(outcomes[1 - winner], Conflict) or (url.startswith("oci") and outcomes[1 - winner] is None)


def test_many_publish_at_once(url: str, packed, tmp_path: Path) -> None:
    """Nobody's version is lost, whoever comes between."""
    stores = [Store(tmp_path / f"writer-{i}") for i in range(4)]
    for i, writer in enumerate(stores):
        writer.put(packed(f"acme/tone@1.{i}", seed=i)[0])
    failed: list[HubError] = []
    ready = threading.Barrier(len(stores))

    def work(writer: Store) -> None:
        remote = from_url(url)
        ready.wait()
        try:
            push(writer, remote, "acme/tone")
        except HubError as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(writer,)) for writer in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    found = {release.version: release.digest for release in from_url(url).catalogue("acme/tone").releases}
    assert found == {f"1.{i}": writer.get("acme/tone").digest for i, writer in enumerate(stores)}


def test_unknown_scheme() -> None:
    with pytest.raises(UsageError) as caught:
        from_url("fille:///tmp/x")
    assert caught.value.hint == "did you mean file?"
    with pytest.raises(UsageError):
        from_url("gopher://x/y")


def test_a_directory_that_is_no_store(tmp_path: Path, store: Store, publish, packed) -> None:
    publish()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"x")
    with pytest.raises(NotFound, match="is no store"):
        push(store, from_url(str(tmp_path / "photos")), "acme/tone")
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.png"]
    with pytest.raises(NotFound) as caught:
        pull(store, from_url(str(packed("acme/x@1.0")[0])), "acme/x")
    assert "artifact directory" in caught.value.hint
    with pytest.raises(UsageError):
        from_url(str(tmp_path / "photos" / "cat.png"))


@pytest.mark.parametrize("what", ["weights", "manifest"])
def test_push_mends_a_damaged_directory(store: Store, second: Store, publish, tmp_path: Path, what: str) -> None:
    artifact = publish()
    remote = from_url(str(tmp_path / "remote"))
    push(store, remote, "acme/tone")
    digest = artifact.digest if what == "manifest" else artifact.manifest.file("adapter_model.safetensors").digest
    path = Store(tmp_path / "remote").blobs.path(digest)
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-2] ^= 2
    path.write_bytes(data)
    with pytest.raises(IntegrityError):
        pull(second, remote, "acme/tone")
    push(store, remote, "acme/tone")
    assert pull(second, remote, "acme/tone") == artifact


def test_any_store_is_a_remote(store: Store, second: Store, publish) -> None:
    artifact = publish()
    assert pull(second, from_url(str(store.root)), "acme/tone") == artifact
    push(second, from_url(str(store.root)), "acme/tone")
    assert store.verify() == []
