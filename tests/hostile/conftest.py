"""Artifacts to be broken, and stores to be broken into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hub.manifest import Draft
from hub.pack import pack
from hub.store import Store


@pytest.fixture
def victim(tmp_path: Path) -> Callable[..., Path]:
    """Write a packed LoRA of about `size` bytes; returns its directory."""

    def make(ref: str = "acme/tone@1.0.0", *, seed: int = 0, size: int = 2000) -> Path:
        name, _, version = ref.partition("@")
        directory = tmp_path / "victims" / f"{name.replace('/', '-')}-{version}-{seed}"
        directory.mkdir(parents=True)
        width = max(size // 8, 4)
        values = np.random.default_rng(seed).normal(size=(2, width)).astype(np.float32)
        tensors = {"q.lora_A.weight": values[:1], "q.lora_B.weight": values[1:].reshape(width, 1)}
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        (directory / "adapter_config.json").write_text('{"lora_alpha": 8, "peft_type": "LORA", "r": 1}')
        (directory / "README.md").write_text("# tone\n")
        pack(directory, Draft(name=name, version=version, kind="lora"))
        return directory

    return make


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")
