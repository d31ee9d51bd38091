"""What is active is the merge itself: the weights that a fold of it writes, or what its certificate says is missing."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import compose
from compose.errors import MergeWarning
from compose.merging.fold import fold
from compose.merging.merge import lower_to_lora, merge
from compose.parameter_space import deltas
from compose.parameter_space.method import Factored, methods
from compose.runtime.model_runtime import runtime

PLACES = {"llama": ("attn.q", "mlp.down"), "gpt2": ("attn.qkv",), "bert": ("attn.q", "attn.o")}
RANKED = sorted(name for name, method in methods().items() if "rank" in method.options.model_fields)
FREE = sorted(name for name, method in methods().items() if method.needs is None)


def two(lab: Any, family: str, *kinds: str) -> Any:
    """Adapters a and b of these kinds on a tiny model."""
    home = lab(family)
    for name, kind, size in zip("ab", kinds * 2, (0, 2), strict=False):
        home.add(kind, name, target_modules=PLACES[family], **({"size": size} if kind != "dense" else {}))
    return home


def text_of(name: str, **options: Any) -> str:
    if name == "lorahub":
        options |= {"weights": "[0.7, -0.4]", "variant": '"exact"'}
    return f"{name}({', '.join(['a', 'b', *(f'{key}={value}' for key, value in options.items())])})"


def data_of(home: Any) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, home.model.config.vocab_size, (6, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": ids}]


def changes(model: Any, text: str) -> dict[str, Tensor]:
    """What a fold of ``text`` changes, by the name of the weight."""
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {part.name: part.value - state[part.name] for part in fold(model, text)}


def energy(parts: dict[str, Tensor]) -> float:
    return sum(float(part.double().square().sum()) for part in parts.values())


def between(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Energy of the difference over that of ``other``."""
    return energy({name: one[name] - part for name, part in other.items()}) / energy(other)


def folded_logits(home: Any, text: str) -> Tensor:
    parts = {part.name: part.value for part in fold(home.model, text)}
    before = {name: home.model.get_parameter(name).detach().clone() for name in parts}
    compose.activate(home.model, None)
    with torch.no_grad():
        for name, value in parts.items():
            home.model.get_parameter(name).copy_(value)
        found = torch.cat(home.tiny.logits(home.model, home.batch))
        for name, value in before.items():
            home.model.get_parameter(name).copy_(value)
    return found


def as_far(home: Any, text: str) -> float:
    """Distance of the active composition from the folded one, relative to what it changes."""
    base = home.logits(None)
    active, folded = home.logits(text), folded_logits(home, text)
    return float((active - folded).norm() / (folded - base).norm())


@pytest.mark.parametrize("family", sorted(PLACES))
@pytest.mark.parametrize("kinds", [("lora",), ("dora",), ("lora", "dora"), ("dense",)], ids="-".join)
def test_every_merge_is_active_as_it_is_folded(lab: Any, family: str, kinds: tuple[str, ...]) -> None:
    home = two(lab, family, *kinds)
    for name in FREE:
        if methods()[name].maximum == 1:
            continue
        text = text_of(name)
        with warnings.catch_warnings():
            warnings.simplefilter("error", MergeWarning)
            try:
                done = compose.activate(home.model, text)
            except compose.errors.KindError:
                assert isinstance(methods()[name], Factored) and kinds != ("lora",)  # low-rank pairs, and nothing else
                continue
        assert done.exact and all(loss.exact for loss in done.certificates.values()), text
        assert as_far(home, text) < 1e-5, text
        assert as_far(home, f"0.5 * {text} + a") < 1e-5, text


@pytest.mark.parametrize("name", sorted(methods().keys() - FREE))
def test_every_merge_on_data_is_what_is_folded(lab: Any, name: str) -> None:
    home = two(lab, "llama", "lora")
    made = merge(home.model, text_of(name), name="made", data=data_of(home))
    compose.attach(home.model, "made", made.adapter)
    assert made.certificate.exact
    assert as_far(home, "made") < 1e-5


@pytest.mark.parametrize("name", RANKED)
def test_with_a_rank_the_certificate_is_the_measured_loss(lab: Any, name: str, caplog: Any) -> None:
    home = two(lab, "llama", "lora")
    data = None if name in FREE else data_of(home)
    for place, options in {"whole": {}, "cut": {"rank": 2}}.items():
        made = merge(home.model, text_of(name, **options), name=place, data=data)
        compose.attach(home.model, place, made.adapter)
    lost = between(changes(home.model, "cut"), changes(home.model, "whole"))
    assert lost > 1e-3
    assert made.certificate.share == pytest.approx(lost, rel=1e-3)
    if data is None:
        text = text_of(name, rank=2)
        with warnings.catch_warnings(), caplog.at_level(logging.INFO, "compose.merges"):
            warnings.simplefilter("error", MergeWarning)  # it was asked for
            done = compose.activate(home.model, text)
        assert [found.share for found in done.certificates.values()] == [pytest.approx(lost, rel=1e-3)]
        assert not done.exact and "of the energy left out" in str(done) and str(done) in caplog.text
        assert as_far(home, text) < 1e-5  # a fold keeps to the rank too


@pytest.mark.parametrize("name", ["ties", "dare", "dare_ties", "magnitude_prune"])
def test_what_does_not_fit_is_cut_and_says_so(lab: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home = two(lab, "llama", "lora")
    text = text_of(name)
    exact = changes(home.model, text)
    monkeypatch.setattr(deltas, "DENSE_BUDGET", sum(part.numel() for part in exact.values()) * 4 - 1)
    with pytest.warns(MergeWarning, match=r"too large to be held whole .*% of the energy left out"):
        done = compose.activate(home.model, text)
    found = runtime(home.model).adapters[next(iter(done.certificates))]
    assert found.kind == "lora"
    compose.attach(home.model, "cut", merge(home.model, text).adapter)
    assert done.certificates.popitem()[1].share == pytest.approx(between(changes(home.model, "cut"), exact), rel=1e-3)
    monkeypatch.setattr(deltas, "DENSE_BUDGET", sum(part.numel() for part in exact.values()) * 4)
    compose.detach(home.model, "cut")
    assert merge(home.model, text).certificate.exact


def test_merges_inside_merges_have_certificates_too(lab: Any) -> None:
    home = two(lab, "llama", "lora")
    done = compose.activate(home.model, ["svd(ties(a, b, rank=2), a, rank=6)", "0.5 * dare(a, b, rank=1)"])
    by_text = {text.partition("(")[0]: loss for text, loss in done.certificates.items()}
    assert set(by_text) == {"svd", "ties", "dare"}
    assert not by_text["ties"].exact
    assert compose.activate(home.model, "a + b").certificates == {}
    again = compose.activate(home.model, "0.5 * dare(a, b, rank=1)")  # resident by now
    assert list(again.certificates.values()) == [by_text["dare"]]
    lowered = lower_to_lora(home.model, "0.5 * ties(a, b, rank=2)", rank=4)
    assert [loss.exact for loss in lowered.inner.values()] == [False]


def test_what_its_members_rank_holds_stays_low_rank(lab: Any) -> None:
    home = two(lab, "llama", "lora")
    made = merge(home.model, "magnitude_prune(a, density=1)")
    assert made.adapter.kind == "lora" and made.certificate.exact
