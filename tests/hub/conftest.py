"""Small real artifacts and isolated stores for the tests of hub."""

from __future__ import annotations

from collections.abc import Callable
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
