"""A store with small real adapters of the built-in base, made once and copied for each test that asks for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TINY = "builtin:tiny-lm"
_STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "a": ("lora", {"r": 4, "layers": (0, 1)}),
    "b": ("lora", {"r": 3, "layers": (0, 1, 2)}),
    "d": ("dora", {"r": 2, "layers": (0,)}),
    "i": ("ia3", {"layers": (0, 1)}),
    "n": ("bottleneck", {"bottleneck_size": 4, "layers": (1,)}),
    "p": ("prefix", {"num_virtual_tokens": 3}),
    "q": ("prompt", {"num_virtual_tokens": 2}),
}


class Stock:
    """The frozen built-in base in float32, and adapters to publish."""

    def __init__(self) -> None:
        import compose

        self.model = compose.load(TINY, dtype="fp32")
        self.base = compose.identity(self.model)

    def adapter(self, name: str, seed: int = 0, made: tuple[str, dict[str, Any]] | None = None) -> Any:
        """A trained-looking adapter of the stock, or of any kind and options: every parameter has moved."""
        import torch

        import compose

        kind, options = made or _STOCK[name]
        adapter = compose.create(self.model, kind, options, name=name, seed=seed)
        generator = torch.Generator().manual_seed(ord(name) + 1000 * seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        return adapter.freeze()

    def publish(self, store: Any, ref: str, out: Path, seed: int = 0, made: Any = None, **facts: Any) -> Any:
        """Publish the adapter that the last letter of the name says, or one of the kind and options ``made``."""
        import compose
        from hub.manifest import Draft
        from hub.pack import pack

        name, _, version = ref.partition("@")
        adapter = self.adapter(name[-1], seed, made)
        compose.save(adapter, out, model=self.model, task="causal_lm")
        facts = {"base": self.base, "task": "causal_lm", "license": "apache-2.0", **facts}
        paths = tuple(adapter.paths)
        pack(out, Draft(name=name, version=version, kind=adapter.kind, placement=paths, **facts))
        return store.put(out)


@pytest.fixture(scope="session")
def stock() -> Stock:
    return Stock()


@pytest.fixture(scope="session")
def _stocked(stock: Stock, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from hub.store import Store

    root = tmp_path_factory.mktemp("stocked")
    store = Store(root / "store")
    for name in _STOCK:
        stock.publish(store, f"ns/{name}@1.0.0", root / name)
    return root / "store"


@pytest.fixture
def store(_stocked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The user's store, holding ns/a ... at 1.0.0."""
    from hub.store import Store

    shutil.copytree(_stocked, tmp_path / "home")
    monkeypatch.setenv("HUB_HOME", str(tmp_path / "home"))
    return Store()


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run ``hub`` in this process; the result has exit_code, stdout and stderr."""
    from click.testing import CliRunner

    from hub.cli import main

    def run(*words: str) -> Any:
        return CliRunner().invoke(main, list(words), catch_exceptions=False)

    return run


@pytest.fixture
def logits(stock: Stock) -> Callable[[Any], Any]:
    """What a model says of one fixed text."""
    import torch

    ids = torch.arange(40, 56).reshape(1, -1)

    def run(model: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=ids).logits

    return run
