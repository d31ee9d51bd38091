"""The remote ``hf://`` against a real registry: what the contract of all remotes does not say."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from hub.errors import Conflict, HubError, IntegrityError, NotFound, RemoteError, UsageError
from hub.ref import AdapterRef
from hub.remotes import from_url
from hub.remotes.hf import HuggingFaceRemote
from hub.store import Store
from hub.transfer import pull, push

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def always_online(online: Path) -> None:
    """All of them meet a server."""


@pytest.fixture
def remote(site) -> HuggingFaceRemote:
    found = from_url(f"hf+{site.url}")
    assert isinstance(found, HuggingFaceRemote)
    return found


@pytest.fixture
def second(tmp_path: Path) -> Store:
    return Store(tmp_path / "second")


def test_hf_endpoint_is_honoured(site, store, second, publish, monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", site.url + "/")
    artifact = publish("acme/tone@1.0.0")
    push(store, from_url("hf://"), "acme/tone")
    assert site.store.get("acme/tone") == artifact
    assert pull(second, from_url("hf://"), "acme/tone") == artifact


def test_a_namespace_holds_adapters_of_any_other(site, remote, store, second, publish) -> None:
    artifact = publish("local/tone@1.0.0")
    home = f"hf+{site.url}/alice"
    # The registry keeps names honest: what is called local/tone is not published as alice/tone.
    with pytest.raises(RemoteError, match="local/tone"):
        push(store, from_url(home), "tone")
    publish("alice/tone@1.0.0")
    push(store, from_url(home), "alice/tone")
    assert from_url(home).names() == ["alice/tone"]
    assert pull(second, from_url(home), "alice/tone").digest != artifact.digest


@pytest.mark.parametrize(
    "url", ["hf://acme/tone", "hf://acme?x=1", "hf://me@acme", "hf+http://", "hf+https://host/a/b", "hf://Acme_"]
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        from_url(url)
    assert caught.value.hint


def test_urls() -> None:
    assert from_url("hf://acme").namespace == "acme"
    assert from_url("hf+https://hub.acme.dev/acme").endpoint == "https://hub.acme.dev"
    assert from_url("hf+https://hub.acme.dev/").namespace is None


def test_the_whole_hub_is_not_listed(monkeypatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert from_url("hf://").names() == []  # no request was made: there is no network here


def test_what_was_pulled_can_be_pulled_offline(site, remote, store, second, publish, tmp_path, monkeypatch) -> None:
    publish("acme/tone@1.0.0")
    publish("acme/tone@1.1.0", seed=1)
    for version in ("1.0.0", "1.1.0"):
        push(store, remote, f"acme/tone@{version}")
    pulled = pull(second, remote, "acme/tone@1.0.0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    third = Store(tmp_path / "third")
    assert pull(third, from_url(f"hf+{site.url}"), "acme/tone@1.0.0") == pulled
    assert third.verify() == []
    with pytest.raises(RemoteError) as caught:  # its manifest is known, its weights were never fetched
        pull(third, from_url(f"hf+{site.url}"), "acme/tone@1.1.0")
    assert "offline" in (caught.value.hint or "")
    with pytest.raises(RemoteError):
        pull(third, from_url(f"hf+{site.url}"), "acme/other")


def test_a_server_that_is_not_there(store, second, publish) -> None:
    publish()
    gone = from_url("hf+http://127.0.0.1:9")
    for call in (lambda: push(store, gone, "acme/tone"), lambda: pull(second, gone, "acme/tone")):
        with pytest.raises(RemoteError) as caught:
            call()
        assert "127.0.0.1:9 cannot be reached" in str(caught.value) and caught.value.hint


def test_every_kind_of_flip_at_the_server_is_caught(site, remote, store, publish, tmp_path, online) -> None:
    artifact = publish()
    push(store, remote, "acme/tone")
    pull(Store(tmp_path / "first"), remote, "acme/tone")
    digests = {entry.digest for entry in artifact.manifest.files} | {artifact.digest}
    for index, digest in enumerate(sorted(digests)):
        path = site.store.blobs.path(digest)
        whole = path.read_bytes()
        path.chmod(0o644)
        for at in range(index, len(whole), max(len(whole) // 6, 1)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << (at % 8)]) + whole[at + 1 :])
            place = tmp_path / f"{index}-{at}"
            import huggingface_hub

            huggingface_hub.constants.HF_HUB_CACHE = str(place / "cache")  # restored by the fixture
            with pytest.raises(HubError):
                pull(Store(place / "store"), from_url(f"hf+{site.url}"), "acme/tone")
            assert Store(place / "store").list() == []
        path.write_bytes(whole)
    assert site.store.verify() == []


def test_a_damaged_cache_is_mended(site, remote, store, publish, tmp_path, online) -> None:
    artifact = publish()
    push(store, remote, "acme/tone")
    assert pull(Store(tmp_path / "one"), remote, "acme/tone") == artifact
    blobs = [path for path in online.rglob("blobs/*") if path.is_file()]
    assert len(blobs) == 4
    for path in blobs:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.chmod(0o644)
        path.write_bytes(data)
    assert pull(Store(tmp_path / "two"), from_url(f"hf+{site.url}"), "acme/tone") == artifact


def test_pushes_at_the_same_time_lose_nothing(site, tmp_path, packed) -> None:
    versions = [f"1.{index}.0" for index in range(5)]
    stores = []
    for index, version in enumerate(versions):
        store = Store(tmp_path / version)
        store.put(packed(f"acme/tone@{version}", seed=index)[0])
        stores.append(store)
    failures = []

    def work(store: Store, version: str) -> None:
        try:
            push(store, from_url(f"hf+{site.url}"), f"acme/tone@{version}")
        except HubError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(stores, versions, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert [release.version for release in site.store.catalogue("acme/tone").releases] == versions
    for store, version in zip(stores, versions, strict=True):
        assert site.store.get(f"acme/tone@{version}") == store.get("acme/tone")


def test_one_version_has_one_winner(site, tmp_path, packed) -> None:
    stores, outcomes = [], []
    for seed in range(4):
        store = Store(tmp_path / str(seed))
        store.put(packed("acme/tone@1.0.0", seed=seed)[0])
        stores.append(store)

    def work(store: Store) -> None:
        try:
            push(store, from_url(f"hf+{site.url}"), "acme/tone")
            outcomes.append(store.get("acme/tone").digest)
        except Conflict:
            outcomes.append(None)

    threads = [threading.Thread(target=work, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(outcomes) == 4
    winners = [digest for digest in outcomes if digest]
    assert winners == [site.store.get("acme/tone").digest]


def test_tokens(guarded, store, second, publish, monkeypatch) -> None:
    publish("acme/tone@1.0.0")
    url = f"hf+{guarded.url}"
    for token in (None, "bob", "reader"):
        if token:
            monkeypatch.setenv("HF_TOKEN", guarded.tokens[token])
        with pytest.raises(RemoteError) as caught:
            push(store, from_url(url), "acme/tone")
        assert "HF_TOKEN" in (caught.value.hint or "")
    assert guarded.store.names() == []
    monkeypatch.setenv("HF_TOKEN", guarded.tokens["alice"])
    push(store, from_url(url), "acme/tone")
    guarded.ask("/api/models/acme/tone/settings", "PUT", {"visibility": "private"}, token="alice")
    monkeypatch.setenv("HF_TOKEN", guarded.tokens["bob"])
    with pytest.raises(NotFound):
        pull(second, from_url(url), "acme/tone")
    monkeypatch.setenv("HF_TOKEN", guarded.tokens["reader"])
    assert pull(second, from_url(url), "acme/tone").ref.version == "1.0.0"


def test_tags_without_a_manifest_are_no_versions(site, remote, second, send_commit, tag, files) -> None:
    send_commit(site, "acme/tone", {"README.md": b"# x\n"})
    tag(site, "acme/tone", "trial")
    assert remote.catalogue("acme/tone").releases == ()
    with pytest.raises(NotFound):
        pull(second, remote, "acme/tone")


@pytest.mark.parametrize("written", ["1.0.0", "v1.0.0"])
def test_a_stock_push_can_be_pulled(site, remote, second, files, send_directory, tag, written: str) -> None:
    send_directory(site, "acme/tone", files())
    tag(site, "acme/tone", written)
    assert pull(second, remote, "acme/tone").manifest.kind == "lora"
    assert second.verify() == []


def test_files_of_the_version_before_do_not_linger(site, remote, store, publish, packed) -> None:
    directory, _ = packed("acme/tone@1.0.0")
    (directory / "notes.txt").write_text("old")
    from hub.manifest import Draft
    from hub.pack import pack

    pack(directory, Draft(name="acme/tone", version="1.0.0", kind="lora"))
    store.put(directory)
    publish("acme/tone@1.1.0", seed=1)
    push(store, remote, "acme/tone@1.0.0")
    push(store, remote, "acme/tone@1.1.0")
    names = [file["rfilename"] for file in site.ask("/api/models/acme/tone").json()["siblings"]]
    assert names == ["README.md", "adapter_config.json", WEIGHTS, "module.json"]


def test_an_unyanked_version_comes_back(site, remote, store, publish) -> None:
    publish("acme/tone@1.0.0")
    push(store, remote, "acme/tone")
    site.store.yank(AdapterRef.parse("acme/tone@1.0.0"), "bad")
    assert remote.catalogue("acme/tone").releases[0].yanked == f"withdrawn in hf+{site.url}"
    site.store.yank(AdapterRef.parse("acme/tone@1.0.0"), None)
    assert remote.catalogue("acme/tone").releases[0].yanked is None


def test_publishing_without_bytes_is_refused(site, remote, publish) -> None:
    manifest = publish().manifest
    with pytest.raises(NotFound, match="lacks"):
        remote.publish(manifest)
    assert site.ask("/api/models").json() == []


def test_a_registry_that_gives_back_something_else(remote, store, publish, monkeypatch) -> None:
    """The remote looks whether the manifest that it tagged is the one that is served."""
    publish()
    sent = HuggingFaceRemote._manifest_at
    monkeypatch.setattr(HuggingFaceRemote, "_manifest_at", lambda *a: sent(*a) + b" ")
    with pytest.raises((RemoteError, IntegrityError), match="does not give back"):
        push(store, remote, "acme/tone")
