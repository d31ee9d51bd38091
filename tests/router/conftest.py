"""A tiny random Llama (GQA) with experts of mixed kinds, all far from the identity; and a store of small adapters."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import compose

VOCABULARY = 61


def tiny_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).eval()


def attach_random(model, name: str, kind: str, seed: int, **config) -> None:
    adapter = compose.create(model, kind, config or None, name=name, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data += 0.15 * torch.randn(parameter.shape, generator=generator)
    adapter.freeze()


@pytest.fixture
def model():
    made = tiny_llama()
    attach_random(made, "a", "lora", 1, r=4, target_modules="all-linear")
    attach_random(made, "b", "lora", 2, r=2, target_modules="all-linear")
    attach_random(made, "c", "ia3", 3)
    compose.activate(made, ["a", "b", "c"])  # where rows stand is found by trial calls, once a model: not to be counted
    compose.activate(made, None)
    return made


@pytest.fixture
def texts() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def attach():
    """Attach one more frozen adapter with random parameters: attach(model, name, kind, seed, **config)."""
    return attach_random


# A store of small adapters on the built-in base: some continue texts, some classify.
BASE = "builtin:tiny-lm"
OWN_TEXTS = (  # of the first and of the second member of a router
    ["The parties agree that", "This agreement shall be governed by the laws", "The court held that the party"],
    ["def main(argv):", "import os, sys", "return self.value + 1"],
)


class RandomAdapters:
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
            self._models[classes] = compose.base.model.load_base(BASE, dtype="fp32", task=task, labels=labels)
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

    def route(self, method, name, members, classes=None):
        """Fit a router on a few texts of each member, and publish it."""
        import torch

        import compose
        from compose.expr.tree import Ref
        from compose.planning.members import AdapterFinder as Leaves
        from router.artifact import members_of, publish
        from router.bench import Bench
        from router.router import Router

        model, tokenizer = self.model(classes), compose.tokenizer(BASE)
        for member in members:
            compose.attach(model, member, self.store.get(f"local/{member}"))
        rows = {
            member: [torch.tensor(tokenizer(text).input_ids) for text in texts]
            for member, texts in zip(members, OWN_TEXTS, strict=True)
        }
        router = Router.fit(method, Bench(model, {m: Ref(m) for m in members}, rows, pad=1))
        compose.activate(model, None)
        for member in members:
            compose.detach(model, member)
        held = members_of([f"local/{member}" for member in members], Leaves(self.store))
        return publish(router, held, f"local/{name}@1.0.0", Leaves(self.store))


@pytest.fixture(scope="session")
def tokenizer():
    """Words `w4` to `w52`, for the tiny models of the families."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(4, 53))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Named adapters of several kinds; `mood` has two classes and `topic` three."""
    import compose.base.model  # noqa: F401

    published = RandomAdapters(tmp_path_factory.mktemp("published"))
    published.publish("law", seed=1)
    published.publish("code", seed=2, options={"r": 4, "target_modules": "all-linear"})
    published.publish("tone", "ia3", seed=3)
    published.publish("lead", "prefix", seed=4)
    published.publish("mood", seed=5, labels=("bad", "good"))
    published.publish("topic", "ia3", seed=6, labels=("art", "sport", "war"))
    return published


@pytest.fixture(scope="session")
def routers(published):
    """Routers in the same store: three over `law` and `code`, and `tasks` over the heads of `mood` and `topic`."""
    published.route("centroid", "near", ("law", "code"))
    published.route("likelihood", "likely", ("law", "code"))
    published.route("arrow", "arrow", ("law", "code"))
    published.route("centroid", "tasks", ("mood", "topic"), classes=2)
    return "near", "likely", "arrow", "tasks"


@pytest.fixture(scope="session")
def engine(published):
    from router.engine.engine import Engine

    return Engine(BASE, store=published.store, dtype="fp32", rows=8)


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
