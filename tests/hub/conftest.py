"""Small real artifacts and isolated stores for the tests of hub."""

from __future__ import annotations

import shutil
import socket
import subprocess
import textwrap
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hub.manifest import BaseIdentity, Draft, Manifest, weights_fingerprint
from hub.pack import pack
from hub.store import Store

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def hub_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """HUB_HOME in the test's own directory; no test ever sees the user's store."""
    home = tmp_path / "home"
    monkeypatch.setenv("HUB_HOME", str(home))
    return home


@pytest.fixture
def plugin_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Make a folder of plugins and, by ``entry="name = module"``, an installed package that adds one to a group."""

    def make(group: str, *, entry: str = "", **modules: str) -> str:
        root = tmp_path / uuid.uuid4().hex
        folder = f"plugins_{root.name}"
        (root / folder).mkdir(parents=True)
        for name, text in {"__init__": "", **modules}.items():
            (root / folder / f"{name}.py").write_text(textwrap.dedent(text))
        if entry:
            name = entry.partition(" ")[0]
            info = root / f"acme_{name}-1.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: acme-{name}\nVersion: 1\n")
            (info / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")
        monkeypatch.syspath_prepend(str(root))
        return folder

    return make


@pytest.fixture
def base_identity() -> BaseIdentity:
    weights = {"model.embed_tokens.weight": "00112233445566ff", "model.norm.weight": "0123456789abcdef"}
    return BaseIdentity(
        repo="builtin:tiny-lm",
        arch_digest="sha256:" + "a" * 64,
        weights_fingerprint=weights_fingerprint(weights),
        weights=weights,
        config_digest="sha256:" + "b" * 64,
        vocab_size=512,
    )


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., Path]:
    """Write the files of a small LoRA; returns their directory."""

    def make(name: str = "tone", *, seed: int = 0, tensors: dict[str, np.ndarray] | None = None) -> Path:
        directory = tmp_path / "files" / name
        directory.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(seed)
        if tensors is None:
            tensors = {
                f"{PREFIX}.lora_A.weight": random.normal(size=(4, 16)).astype(np.float32),
                f"{PREFIX}.lora_B.weight": random.normal(size=(16, 4)).astype(np.float32),
            }
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        (directory / "adapter_config.json").write_text('{"lora_alpha": 8, "peft_type": "LORA", "r": 4}')
        (directory / "README.md").write_text(f"# {name}\n")
        return directory

    return make


@pytest.fixture
def packed(files: Callable[..., Path]) -> Callable[..., tuple[Path, Manifest]]:
    """Write and pack a small LoRA; returns its directory and manifest."""

    def make(ref: str = "acme/tone@1.0.0", *, seed: int = 0, **facts: object) -> tuple[Path, Manifest]:
        name, _, version = ref.partition("@")
        directory = files(f"{name.replace('/', '-')}-{version}-{seed}", seed=seed)
        facts.setdefault("kind", "lora")
        return directory, pack(directory, Draft(name=name, version=version, **facts))

    return make


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def publish(store: Store, packed: Callable[..., tuple[Path, Manifest]]):
    """Pack and put in one step."""

    def make(ref: str = "acme/tone@1.0.0", **facts: object):
        return store.put(packed(ref, **facts)[0])

    return make


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """moto's S3 server on loopback; gives its endpoint."""
    pytest.importorskip("s3fs", reason="the extra `s3` is not installed")
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_url(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket of its own."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"b{abs(hash(tmp_path)):x}"
    with urllib.request.urlopen(urllib.request.Request(f"{s3_server}/{bucket}", method="PUT")) as answer:
        assert answer.status == 200
    return f"s3://{bucket}/adapters"


@contextmanager
def docker_registry(place: Path, more: str = "") -> Iterator[str]:
    """Debian's docker-registry on loopback; gives ``host:port``."""
    pytest.importorskip("oras", reason="the extra `oci` is not installed")
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("the program docker-registry is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    (place / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\nhttp: {{addr: '{host}'}}\n"
        f"storage: {{filesystem: {{rootdirectory: {place}}}, delete: {{enabled: true}}}}\n{more}"
    )
    with (place / "log").open("wb") as log:
        server = subprocess.Popen([program, "serve", str(place / "config.yml")], stdout=log, stderr=log)
        for _ in range(500):
            try:
                urllib.request.urlopen(f"http://{host}/v2/").close()
                break
            except urllib.error.HTTPError:  # it wants a login, so it is there
                break
            except urllib.error.URLError:
                assert server.poll() is None, (place / "log").read_text()
                time.sleep(0.02)
        yield host
        server.kill()
        server.wait()


@pytest.fixture(scope="session")
def oci_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A registry for all tests; gives ``host:port`` and the directory of its blobs."""
    place = tmp_path_factory.mktemp("oci")
    with docker_registry(place) as host:
        yield host, place / "docker/registry/v2/blobs/sha256"


@pytest.fixture
def oci_private(tmp_path: Path) -> Iterator[str]:
    """A registry that knows the user ``me`` with the password ``secret``, and nobody else; gives ``host:port``."""
    (tmp_path / "htpasswd").write_text("me:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n")
    with docker_registry(tmp_path, f"auth: {{htpasswd: {{realm: here, path: {tmp_path}/htpasswd}}}}\n") as host:
        yield host


@pytest.fixture
def oci_url(oci_server: tuple[str, Path], tmp_path: Path) -> str:
    """A prefix of its own."""
    return f"oci://{oci_server[0]}/t{abs(hash(tmp_path)):x}"
