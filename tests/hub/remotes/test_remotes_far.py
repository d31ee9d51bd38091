"""What only object stores and OCI registries can do to an artifact: logins, foreign images, moved tags, gaps."""

import base64
import json
import threading
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

from hub.errors import Conflict, IntegrityError, NotFound, RefError, RemoteError, UsageError
from hub.remotes import from_url
from hub.storage.oci import IMAGE_MANIFEST, image_manifest
from hub.store import Store
from hub.transfer import pull, push


def test_logins_are_those_of_docker(oci_private: str, store: Store, publish, tmp_path: Path, monkeypatch) -> None:
    artifact, url = publish(), f"oci://{oci_private}/team"
    config = tmp_path / "docker"
    config.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(config))
    for name in ("ORAS_USER", "ORAS_PASS"):
        monkeypatch.delenv(name, raising=False)

    def login(password: str) -> None:
        token = base64.b64encode(f"me:{password}".encode()).decode()
        (config / "config.json").write_text(json.dumps({"auths": {oci_private: {"auth": token}}}))

    (config / "config.json").write_text("{}")
    for password in (None, "wrong"):
        if password:
            login(password)
        with pytest.raises(RemoteError) as caught:
            push(store, from_url(url), "acme/tone")
        assert caught.value.hint == f"log in: docker login {oci_private}"
        assert "wrong" not in str(caught.value)
    login("secret")
    push(store, from_url(url), "acme/tone")
    assert pull(Store(tmp_path / "second"), from_url(url), "acme/tone") == artifact
    assert from_url(url).names() == ["acme/tone"]


def put_tag(url: str, name: str, tag: str, image: bytes) -> None:
    place = url.replace("oci://", "http://").replace("/t", "/v2/t", 1)
    headers = {"Content-Type": IMAGE_MANIFEST}
    request = urllib.request.Request(f"{place}/{name}/manifests/{tag}", image, headers, method="PUT")
    urllib.request.urlopen(request).close()


def test_images_of_others_are_no_versions(oci_url: str, store: Store, publish) -> None:
    artifact = publish()
    push(store, from_url(oci_url), "acme/tone")
    image = json.loads(image_manifest(artifact.manifest.canonical))
    image["config"]["mediaType"] = "application/vnd.oci.image.config.v1+json"
    for tag in ("2.0.0", "prod", "Weird_TAG"):
        put_tag(oci_url, "acme/tone", tag, json.dumps(image).encode())
    catalogue = from_url(oci_url).catalogue("acme/tone")
    assert [release.version for release in catalogue.releases] == ["1.0.0"]
    assert catalogue.aliases == {}


def test_a_version_under_another_number_is_refused(oci_url: str, store: Store, publish, tmp_path: Path) -> None:
    artifact = publish()
    push(store, from_url(oci_url), "acme/tone")
    put_tag(oci_url, "acme/tone", "7.0", image_manifest(artifact.manifest.canonical))
    with pytest.raises(IntegrityError, match=r"has acme/tone@1\.0\.0 under the name"):
        pull(Store(tmp_path / "second"), from_url(oci_url), "acme/tone@7.0")


def test_a_moved_tag_does_not_move_what_is_pinned(oci_url: str, store: Store, packed, tmp_path: Path) -> None:
    mine = store.put(packed(seed=0)[0])
    push(store, from_url(oci_url), "acme/tone")
    other = Store(tmp_path / "other")
    theirs = other.put(packed(seed=1)[0])
    remote = from_url(oci_url)
    for entry in theirs.manifest.files:
        remote.write(theirs.manifest, entry, theirs.file(entry.path), lambda count: None)
    remote._wire.upload_bytes(remote._repo("acme/tone"), theirs.manifest.canonical)
    put_tag(oci_url, "acme/tone", "1.0.0", image_manifest(theirs.manifest.canonical))
    with pytest.raises(NotFound):
        pull(Store(tmp_path / "second"), from_url(oci_url), f"acme/tone@{mine.digest}")


@pytest.mark.parametrize("when", ["before it is read back", "before the versions are listed"])
def test_an_update_that_is_lost_is_told(oci_url: str, store: Store, packed, tmp_path: Path, when: str) -> None:
    """There is no compare-and-swap: who finds another image under the version says so, and what to do."""
    mine = store.put(packed(seed=0)[0])
    other = Store(tmp_path / "other")
    theirs = other.put(packed(seed=1)[0])
    remote = from_url(oci_url)
    for entry in theirs.manifest.files:
        remote.write(theirs.manifest, entry, theirs.file(entry.path), lambda count: None)
    remote._wire.upload_bytes(remote._repo("acme/tone"), theirs.manifest.canonical)
    meddle, catalogue, put = [True], remote.catalogue, remote._wire.put

    def put_then_lose(path: str, *rest: object) -> None:
        put(path, *rest)
        if when == "before it is read back":
            put_tag(oci_url, "acme/tone", "1.0.0", image_manifest(theirs.manifest.canonical))

    def lose_then_list(name: str):
        if when == "before the versions are listed" and remote.published and meddle.pop():
            put_tag(oci_url, "acme/tone", "1.0.0", image_manifest(theirs.manifest.canonical))
        return catalogue(name)

    def put_and_note(*given: object) -> None:
        put_then_lose(*given)
        remote.published = True

    remote.published = False
    remote._wire.put, remote.catalogue = put_and_note, lose_then_list
    with pytest.raises(Conflict) as caught:
        push(store, remote, "acme/tone")
    assert "acme/tone" in str(caught.value)
    assert "version" in caught.value.hint
    found = from_url(oci_url).catalogue("acme/tone").find(version="1.0.0")
    assert found.digest == theirs.digest != mine.digest


def test_names_that_no_registry_takes(oci_url: str, store: Store, publish) -> None:
    publish("acme/a._b@1.0")
    with pytest.raises(RefError, match="OCI repository"):
        push(store, from_url(oci_url), "acme/a._b")


@pytest.mark.parametrize("url", ["oci://", "oci:///x", "oci://host/Bad", "s3://", "memory://"])
def test_urls_that_name_no_place(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        from_url(url)
    assert caught.value.hint


def test_nobody_there() -> None:
    pytest.importorskip("oras", reason="the extra `oci` is not installed")
    with pytest.raises(RemoteError) as caught:
        from_url("oci://127.0.0.1:1/x").catalogue("acme/tone")
    assert "127.0.0.1:1" in caught.value.hint


def test_no_bucket(s3_url: str, store: Store, publish) -> None:
    publish()
    with pytest.raises(NotFound, match="nosuchbucket") as caught:
        push(store, from_url("s3://nosuchbucket/x"), "acme/tone")
    assert "bucket" in caught.value.hint
    assert from_url("s3://nosuchbucket/x").names() == []


@pytest.mark.parametrize(("scheme", "package", "extra"), [("gs", "gcsfs", "gcs"), ("az", "adlfs", "azure")])
def test_a_missing_package_is_named(scheme: str, package: str, extra: str) -> None:
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(UsageError) as caught:
        from_url(f"{scheme}://bucket/x").names()
    assert caught.value.hint == f'pip install "moduloom[{extra}]"'


def test_ranges_of_one_blob_are_asked_for_at_once(store: Store, publish, tmp_path: Path, monkeypatch) -> None:
    """Four of them meet, which they could not one after the other; what arrives is in order, from an offset too."""
    pytest.importorskip("fsspec")
    from hub.remotes import fsspec as module

    artifact, remote = publish(), from_url(f"memory://{tmp_path.name}")
    push(store, remote, "acme/tone")
    entry = artifact.manifest.file("adapter_model.safetensors")
    data = artifact.file(entry.path).read_bytes()
    monkeypatch.setattr(module, "CHUNK", 50)
    fs, root = remote._place

    class Meeting:
        ready, left = threading.Barrier(module._AHEAD, timeout=30), module._AHEAD

        def __getattr__(self, name: str):
            return getattr(fs, name)

        def cat_file(self, path: str, start: int, end: int) -> bytes:
            with lock:
                self.left -= 1
                wait = self.left >= 0
            if wait:
                self.ready.wait()
            return fs.cat_file(path, start=start, end=end)

    lock = threading.Lock()
    remote.__dict__["_place"] = Meeting(), root
    assert b"".join(remote.read(artifact.manifest, entry, 0)) == data
    assert b"".join(remote.read(artifact.manifest, entry, 77)) == data[77:]
    first = remote.read(artifact.manifest, entry, 0)  # whoever stops early leaves no thread at work
    assert next(iter(first)) == data[:50]
    first.close()


@pytest.mark.parametrize("harm", ["gap", "changed", "garbage"])
def test_a_damaged_log_in_a_bucket(store: Store, publish, tmp_path: Path, harm: str) -> None:
    fsspec = pytest.importorskip("fsspec")
    url = f"memory://{tmp_path.name}"
    fs, root = fsspec.url_to_fs(url)
    for i in range(3):
        publish(f"acme/tone@1.{i}", seed=i)
        push(store, from_url(url), f"acme/tone@1.{i}")
    path = f"{root}/log/acme/tone/00000002.json"
    if harm == "gap":
        fs.rm(path)
    else:
        fs.pipe_file(path, b"garbage" if harm == "garbage" else fs.cat_file(path).replace(b"1.1", b"1.7"))
    with pytest.raises(IntegrityError):
        from_url(url).catalogue("acme/tone")
