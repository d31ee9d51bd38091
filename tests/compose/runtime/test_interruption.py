"""Ctrl-C at any line of activate, route, attach, detach, eject or a forward leaves what was active whole."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import compose
from compose.runtime.model_runtime import runtime

PACKAGE = Path(compose.__file__).parent
WATCHED = tuple(
    str(PACKAGE / name) for name in ("runtime", "api.py", "slots/call.py", "slots/slot.py", "slots/side.py")
)
KINDS = ("lora", "dora", "prefix", "prompt", "bottleneck", "ladder", "dense")
OLD, NEW = "lora >> dora >> prefix >> prompt >> bottleneck >> ladder", "0.5 * lora + dense >> prefix"


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line of ours that runs inside; ``lines`` counts them."""

    def __init__(self, at: int) -> None:
        self.at, self.lines = at, 0

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(WATCHED):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


@contextmanager
def traced(at: int) -> Iterator[Interrupt]:
    interrupt, before = Interrupt(at), sys.gettrace()
    sys.settrace(interrupt)
    try:
        yield interrupt
    finally:
        sys.settrace(before)


def model_of(tiny):
    model = tiny.model("llama", num_hidden_layers=1)
    for i, kind in enumerate(KINDS):
        tiny.adapter(model, kind, kind, seed=i).freeze()
    compose.activate(model, OLD)
    return model


def outputs(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def state(model):
    """What tells whether two states of a model are one, beside its outputs."""
    home = model.__dict__.get("moduloom")
    flags = [p.requires_grad for name, p in model.named_parameters() if not name.startswith("moduloom")]
    if home is None:
        return flags, None, [name for name, m in model.named_modules() if "forward" in m.__dict__]
    assert list(model.moduloom_adapters.values()) == list(home.adapters.values())
    return flags, list(home.adapters), (home.rows, home.weights, home.routing is None)


def interruptions(act: Callable[[], object], *, most: int = 40) -> Iterator[int]:
    """Do it, interrupted at its n-th line, for one n after another (of many every k-th) until it comes to its end."""
    at, step = 1, 1
    while True:
        try:
            with traced(at) as interrupt:
                act()
        except KeyboardInterrupt:
            yield at
            at += step
            step = 1 + at // most
        else:
            assert interrupt.lines >= 5
            return


def half(path, x):
    return torch.full((1, 1, 2), 0.5)


ACTIONS = {
    "activate": lambda model: compose.activate(model, NEW),
    "activate rows": lambda model: compose.activate(model, ["lora", None]),
    "activate a merge": lambda model: compose.activate(model, "ties(lora, dora, density=0.5)"),
    "activate nothing": lambda model: compose.activate(model, None),
    "route": lambda model: compose.route(model, ["lora", "dense"], half),
    "attach": lambda model: compose.attach(model, "lora", model.spare),
    "attach another": lambda model: compose.attach(model, "other", model.spare),
    "detach": lambda model: compose.detach(model, "dense"),
    "eject": lambda model: compose.eject(model),
    "refresh": lambda model: compose.refresh(model),
}


@pytest.mark.parametrize("most", [40, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("action", ACTIONS)
def test_what_was_active_stays_whole(tiny, action, most):
    batch, act = tiny.batch("llama", tiny.rows(4, 3)), ACTIONS[action]
    spare = tiny.adapter(tiny.model("llama", num_hidden_layers=1), "lora", "spare", seed=9).freeze()

    def fresh():
        model = model_of(tiny)
        model.__dict__["spare"] = spare
        return model, outputs(model, batch), state(model)

    done, _, _ = fresh()
    act(done)
    wanted, wanted_state = outputs(done, batch), state(done)
    model, old, old_state = fresh()
    held, count = [model], 0
    for at in interruptions(lambda: act(held[0]), most=most):
        count += 1
        logits, now = outputs(held[0], batch), state(held[0])
        if now == old_state and torch.equal(logits, old):
            continue
        # Else all of it has happened: the last lines come after that.
        assert now == wanted_state, f"interrupted at line {at}"
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
        held[0], _, _ = fresh()
    assert count > 10
    torch.testing.assert_close(outputs(held[0], batch), wanted, atol=1e-5, rtol=1e-5)


def test_the_first_injection(tiny):
    batch = tiny.batch("llama", tiny.rows(4, 3))
    model = tiny.model("llama", num_hidden_layers=1).requires_grad_(True)
    bare = outputs(model, batch)
    for at in interruptions(lambda: runtime(model)):
        if "moduloom" in model.__dict__:
            compose.eject(model)
        assert all(p.requires_grad for p in model.parameters()), at
        assert not any("forward" in m.__dict__ for m in model.modules()), at
        assert "moduloom_adapters" not in model._modules
    compose.eject(model)
    assert torch.equal(outputs(model, batch), bare)


def test_a_forward(tiny):
    """Nothing of an interrupted call is left for the next one: no prompt, no batch, no gradient switched off."""
    batch, other = tiny.batch("llama", tiny.rows(4, 3)), tiny.batch("llama", tiny.rows(5, 2, 6))
    model = model_of(tiny)
    for adapter in runtime(model).adapters.values():
        adapter.requires_grad_(False)
    runtime(model).adapters["ladder"].unfreeze()
    through = lambda: model.base_model(**other).last_hidden_state.detach()  # noqa: E731
    whole = lambda: model(**batch).logits.detach()  # noqa: E731
    expected = whole(), through()
    for i, at in enumerate(interruptions(lambda: model(**other), most=25)):
        assert torch.is_grad_enabled()
        assert torch.equal(*((through(), expected[1]) if i % 2 else (whole(), expected[0]))), at
    assert i > 50
