"""Threads that call one model at once get what each would get alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import pytest
import torch

from compose.kind.registry import kinds
from compose.runtime.model_runtime import activate, route

KINDS = sorted(kinds())
SHAPES = ((9, 5), (4, 4), (6, 2), (12, 1))


@pytest.fixture(autouse=True)
def switches():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(works: list[Callable[[], None]]) -> None:
    errors = []

    def guarded(work):
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def same_as_alone(model, batches, logits, *, times=8, tolerance=1e-4):
    alone = [logits(model, batch) for batch in batches]

    def work(batch, expected):
        def run():
            for _ in range(times):
                for ours, theirs in zip(logits(model, batch), expected, strict=True):
                    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)

        return run

    together([work(batch, expected) for batch, expected in zip(batches, alone, strict=True)])


def near(ours, theirs):
    return all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))


def model_of(tiny, kind, family="llama"):
    family = "bert" if kind == "head" else family
    model = tiny.model(family, task="classification" if kind == "head" else "lm")
    return model, [tiny.batch(family, tiny.rows(*shape)) for shape in SHAPES]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [False, True])
def test_each_kind(tiny, kind, rows):
    model, batches = model_of(tiny, kind)
    tiny.adapter(model, kind, "a").freeze()
    tiny.adapter(model, kind, "b", seed=2, size=1).freeze()
    activate(model, ["a", "b"] if rows else "a")
    same_as_alone(model, batches, tiny.logits)


@pytest.mark.parametrize("family", ["t5", "bert", "gpt2", "opt"])
def test_all_at_once(tiny, family):
    """A prompt, a prefix that moves positions, a parallel bottleneck that reads another site, a ladder."""
    model, batches = model_of(tiny, "lora", family)
    names = ["prompt", "lora", "ladder", "dense", *(["prefix"] if family != "bert" else [])]
    for kind in names:
        tiny.adapter(model, kind, kind).freeze()
    tiny.adapter(model, "bottleneck", "parallel", style="parallel").freeze()
    activate(model, [" >> ".join(names), "parallel >> lora"])
    same_as_alone(model, batches, tiny.logits)


def test_live_adapters_and_gates(tiny):
    model, batches = model_of(tiny, "lora")
    tiny.adapter(model, "dora", "a")
    tiny.adapter(model, "lora", "b")
    activate(model, "a + b")
    same_as_alone(model, batches, tiny.logits)
    for adapter in model.moduloom_adapters.values():
        adapter.freeze()
    route(model, ["a", "b"], lambda path, x: x[..., :2].softmax(-1))
    same_as_alone(model, batches, tiny.logits)


def test_gradients_are_each_thread_s_own(tiny):
    """Where only a ladder learns, the backbone runs without gradients: in its own thread alone."""
    model, batches = model_of(tiny, "ladder")
    tiny.adapter(model, "ladder", "a")
    activate(model, "a")

    def gradients(model, batch):
        return [model(**batch).logits.detach()] if not torch.is_grad_enabled() else [_gradient(model, batch)]

    def _gradient(model, batch):
        parameters = list(model.moduloom_adapters["@a"].parameters())
        loss = model(**batch).logits.square().mean()
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, parameters, allow_unused=True) if g is not None]
        )

    same_as_alone(model, batches, gradients)


def test_generate(tiny):
    model, _ = model_of(tiny, "prompt")
    tiny.adapter(model, "prompt", "a").freeze()
    tiny.adapter(model, "prefix", "b").freeze()
    activate(model, "a >> b")

    def tokens(model, batch):
        return [model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)]

    prompts = [
        {"input_ids": torch.stack(tiny.rows(n, n)), "attention_mask": torch.ones(2, n, dtype=torch.long)}
        for n in (3, 7, 5)
    ]
    same_as_alone(model, prompts, tokens, times=3)


def test_a_forward_keeps_the_composition_it_began_with(tiny):
    """While one thread makes this and that active, each answer of the others is of one of them, whole."""
    model, batches = model_of(tiny, "lora")
    compositions = ["lora >> prefix", None, "prompt", "dora + lora", ["prefix", None]]
    for kind in ("lora", "dora", "prefix", "prompt"):
        tiny.adapter(model, kind, kind).freeze()
    expected = []
    for expr in compositions:
        activate(model, expr)
        expected.append([tiny.logits(model, batch) for batch in batches])
    done = threading.Event()

    def switch():
        try:
            for i in range(60):
                activate(model, compositions[i % len(compositions)])
        finally:
            done.set()

    def ask(i):
        def run():
            while not done.is_set():
                ours = tiny.logits(model, batches[i])
                assert any(near(ours, known[i]) for known in expected)

        return run

    together([switch, ask(0), ask(1), ask(2)])
