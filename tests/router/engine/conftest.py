"""A store of small adapters on the built-in base: some continue texts, some classify."""

from __future__ import annotations

import json

import pytest

BASE = "builtin:tiny-lm"


class Shelf:
    """Publishes adapters whose tensors are drawn from a seed."""

    def __init__(self, root):
        from hub.store import Store

        self.store = Store(root / "store")
        self._root, self._models = root, {}

    def model(self, classes: int | None):
        import compose

        if classes not in self._models:
            labels = None if classes is None else [f"c{i}" for i in range(classes)]
            task = "causal_lm" if classes is None else "classification"
            self._models[classes] = compose.base.load_base(BASE, dtype="fp32", task=task, labels=labels)
        return self._models[classes]

    def publish(self, name, kind="lora", *, seed=0, labels=(), noise=0.15, options=None, version="1.0.0", **facts):
        import torch

        import compose
        from hub.manifest import Draft
        from hub.pack import pack

        model = self.model(len(labels) or None)
        options = {**({"modules_to_save": ("score",)} if labels and kind != "head" else {}), **(options or {})}
        adapter = compose.create(model, kind, options, name=name, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapter.parameters():
            parameter.data += noise * torch.randn(parameter.shape, generator=generator)
        task = "classification" if labels else "causal_lm"
        directory = self._root / "dirs" / f"{name}-{version}"
        compose.save(adapter.freeze(), directory, model=model, task=task)
        compose.detach(model, name)
        (directory / "README.md").write_text(f"# {name}\n")
        draft = Draft(
            name=f"local/{name}",
            version=version,
            kind=kind,
            method="plain",
            base=compose.identity(model),
            placement=tuple(adapter.paths),
            task=task,
            labels=tuple(labels),
            **facts,
        )
        pack(directory, draft)
        return self.store.put(directory)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    """Named adapters of several kinds; `mood` has two classes and `topic` three."""
    import compose.base  # noqa: F401

    shelf = Shelf(tmp_path_factory.mktemp("shelf"))
    shelf.publish("law", seed=1)
    shelf.publish("code", seed=2, options={"r": 4, "target_modules": "all-linear"})
    shelf.publish("tone", "ia3", seed=3)
    shelf.publish("lead", "prefix", seed=4)
    shelf.publish("mood", seed=5, labels=("bad", "good"))
    shelf.publish("topic", "ia3", seed=6, labels=("art", "sport", "war"))
    return shelf


@pytest.fixture(scope="session")
def engine(shelf):
    from router.engine.engine import Engine

    return Engine(BASE, store=shelf.store, dtype="fp32", rows=8)


TEXTS = (
    "The parties agree that",
    "def main(",
    "It was a dark night and the old man of the sea had nothing left to say to anyone",
    "To be",
    "For all of the above reasons we hold",
)
ADAPTERS = (None, "law", "code", "0.5 * law + code", "mood", "tone", "topic", "lead", "law >> mood", "ties(law, law)")


@pytest.fixture
def jsonl(tmp_path):
    """Writes rows as JSONL; by default a mixture of tasks and lengths."""

    def write(rows=None, name="rows.jsonl", count=60):
        if rows is None:
            rows = [
                {"id": i, "text": TEXTS[i % len(TEXTS)] + " of" * (i % 3), "adapter": ADAPTERS[i % len(ADAPTERS)]}
                for i in range(count)
            ]
        path = tmp_path / name
        path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
        return path

    return write
