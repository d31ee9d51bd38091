"""Compositions and merges as artifacts: they come back as what they were, whatever happens to their members."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import compose
from compose.algebra import digest, parse
from compose.artifacts.publish import publish_composition, publish_merge
from compose.errors import CompositionCycle, KindError, MissingRequirement, PlanError
from compose.planning.members import AdapterFinder
from hub.errors import BaseMismatch, Conflict, HubError, NotFound, UsageError
from hub.manifest import Draft, Requirement
from hub.pack import pack
from hub.ref import AdapterRef
from hub.remotes import from_url
from hub.store import Store
from hub.transfer import pull, push

TINY = "builtin:tiny-lm"


def load(expr: Any, **options: Any) -> Any:
    return compose.load(TINY, expr, dtype="fp32", **options)


def by_hand(store: Store, ref: str, text: str, out: Path, *requires: Requirement) -> None:
    """A composition that our command did not make."""
    out.mkdir()
    name, _, version = ref.partition("@")
    pack(out, Draft(name=name, version=version, type="composition", expression=text, requires=requires))
    store.put(out)


# -- compositions --------------------------------------------------------------------------------------------------


def test_a_composition_comes_back_as_the_expression_it_was(store: Any, logits: Any) -> None:
    text = "0.5 * ns/a + ns/b@1.0.0 >> ns/i + ns/p"
    artifact = publish_composition(text, "ns/all@1.2.0", AdapterFinder())
    manifest = artifact.manifest
    assert (manifest.type, manifest.kind) == ("composition", "")
    assert digest(parse(str(manifest.expression))) == digest(parse(text))
    assert manifest.base.repo == TINY
    assert (manifest.task, manifest.license) == ("causal_lm", "apache-2.0")
    needs = {need.name: (need.range, need.digest) for need in manifest.requires}
    assert needs == {
        "ns/a": (">=1.0.0,<2", store.get("ns/a").digest),
        "ns/b": ("==1.0.0", store.get("ns/b").digest),
        "ns/i": (">=1.0.0,<2", store.get("ns/i").digest),
        "ns/p": (">=1.0.0,<2", store.get("ns/p").digest),
    }
    assert manifest.lineage.parents == ("ns/a@1.0.0", "ns/b@1.0.0", "ns/i@1.0.0", "ns/p@1.0.0")
    assert "| ns/b | ==1.0.0 | ns/b@1.0.0 |" in artifact.read("README.md").decode()
    assert torch.equal(logits(load("ns/all")), logits(load(text)))
    assert torch.equal(logits(load("2 * ns/all >> ns/d")), logits(load(f"2 * ({text}) >> ns/d")))
    assert store.verify() == []


def test_it_goes_on_meaning_what_it_meant(store: Any, stock: Any, tmp_path: Path, logits: Any) -> None:
    store.tag("ns/a@1.0.0", "prod")
    publish_composition("ns/a@prod + ns/b", "ns/both@1.0.0", AdapterFinder())
    before = logits(load("ns/both"))
    stock.publish(store, "ns/a@1.1.0", tmp_path / "a2", seed=1)
    stock.publish(store, "ns/b@2.0.0", tmp_path / "b2", seed=1)
    store.tag("ns/a@1.1.0", "prod")
    store.yank(AdapterRef.parse("ns/b@1.0.0"), "old")
    assert torch.equal(logits(load("ns/both")), before)
    assert not torch.equal(logits(load("ns/a@prod + ns/b")), before)
    # published anew it means the new ones
    publish_composition("ns/a@prod + ns/b", "ns/both@1.0.1", AdapterFinder())
    assert torch.equal(logits(load("ns/both@1.0.1")), logits(load("ns/a@1.1.0 + ns/b@2.0.0")))
    assert torch.equal(logits(load("ns/both@1.0.0")), before)


def test_two_versions_of_one_adapter_stay_two(store: Any, stock: Any, tmp_path: Path, logits: Any) -> None:
    stock.publish(store, "ns/a@2.0.0", tmp_path / "a2", seed=1)
    artifact = publish_composition("ns/a@1.0.0 - 0.5 * ns/a@2.0.0", "ns/difference@1.0.0", AdapterFinder())
    assert {need.range for need in artifact.manifest.requires} == {"==1.0.0", "==2.0.0"}
    direct = logits(load("ns/a@1.0.0 - 0.5 * ns/a@2.0.0"))
    torch.testing.assert_close(logits(load("ns/difference")), direct, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(direct, logits(load("0.5 * ns/a@1.0.0")), atol=1e-2)


def test_compositions_of_compositions(store: Any, stock: Any, tmp_path: Path, logits: Any) -> None:
    publish_composition("ns/a + ns/b", "ns/inner@1.0.0", AdapterFinder())
    outer = publish_composition("0.5 * ns/inner >> ns/d", "ns/outer@1.0.0", AdapterFinder())
    assert [need.name for need in outer.manifest.requires] == ["ns/d", "ns/inner"]
    before = logits(load("ns/outer"))
    publish_composition("ns/b", "ns/inner@1.1.0", AdapterFinder())
    assert torch.equal(logits(load("ns/outer")), before)
    assert torch.equal(before, logits(load("0.5 * (ns/a + ns/b) >> ns/d")))


def test_names_from_the_command_line_are_written_as_refs(store: Any, logits: Any) -> None:
    finder = AdapterFinder(given={"tone": "ns/a", "law": "ns/b@1.0.0"})
    artifact = publish_composition("tone + 2 * law", "ns/named@1.0.0", finder)
    assert str(artifact.manifest.expression) == "ns/a + 2 * ns/b@1.0.0"
    assert torch.equal(logits(load("ns/named")), logits(load("ns/a + 2 * ns/b")))


def test_ensembles_can_be_published_and_are_checked_on_a_base(store: Any) -> None:
    artifact = publish_composition("ensemble.demix(ns/a, ns/b >> ns/i)", "ns/mix@1.0.0", AdapterFinder(), base=TINY)
    assert len(artifact.manifest.requires) == 3


def test_it_travels_with_its_members(store: Any, tmp_path: Path, logits: Any) -> None:
    publish_composition("ns/a >> ns/i", "ns/both@1.0.0", AdapterFinder())
    remote = from_url(str(tmp_path / "remote"))
    push(store, remote, "ns/both@1.0.0")
    other = Store(tmp_path / "other")
    pull(other, remote, "ns/both")
    assert torch.equal(logits(load("ns/both", store=other)), logits(load("ns/a >> ns/i")))


def test_a_missing_requirement_is_named_with_who_needs_it(store: Any, tmp_path: Path) -> None:
    publish_composition("ns/a + ns/i", "ns/both@1.0.0", AdapterFinder())
    publish_composition("ns/both >> ns/b", "ns/outer@1.0.0", AdapterFinder())
    remote = from_url(str(tmp_path / "remote"))
    push(store, remote, "ns/outer")
    other = Store(tmp_path / "other")
    pull(other, remote, "ns/b")
    pull(other, remote, "ns/both", requires=False)
    pull(other, remote, "ns/i")
    with pytest.raises(MissingRequirement, match=r"composition ns/both requires ns/a>=1.0.0,<2 \(sha256:") as caught:
        load("ns/b + ns/both", store=other)
    assert caught.value.hint.startswith("bring it with its composition: hub pull ns/both")
    pull(other, remote, "ns/outer", requires=False)
    with pytest.raises(MissingRequirement, match=r"composition ns/both@sha256:\w+ requires ns/a>="):
        load("ns/outer", store=other)


def test_circles_are_refused_naming_them(store: Any, tmp_path: Path) -> None:
    by_hand(store, "ns/x@1.0.0", "ns/a + ns/y", tmp_path / "x")
    by_hand(store, "ns/y@1.0.0", "2 * ns/z", tmp_path / "y")
    by_hand(store, "ns/z@1.0.0", "ns/x >> ns/b", tmp_path / "z")
    with pytest.raises(CompositionCycle, match="ns/x contains itself: ns/x -> ns/y -> ns/z -> ns/x"):
        load("ns/x")
    with pytest.raises(CompositionCycle, match="contains itself"):
        publish_composition("ns/x + ns/a", "ns/w@1.0.0", AdapterFinder())
    with pytest.raises(NotFound, match="ns/w"):
        store.get("ns/w")
    by_hand(store, "ns/self@1.0.0", "ns/self + ns/a", tmp_path / "s")
    with pytest.raises(CompositionCycle):
        load("ns/self")


def test_what_cannot_be_published_leaves_nothing(store: Any, stock: Any, tmp_path: Path) -> None:
    compose.save(stock.adapter("a"), tmp_path / "loose", model=stock.model)
    for text, ref, says in (
        ("ns/a + ns/b", "ns/new", "names no version"),
        ("ns/a +", "ns/new@1.0.0", "something is missing here"),
        ("ns/a + ns/absent", "ns/new@1.0.0", "there is no adapter ns/absent"),
        ("ensemble.mean(ns/a, ns/b) + ns/a", "ns/new@1.0.0", "must be outermost"),
        (f'"{tmp_path}/loose" + ns/a', "ns/new@1.0.0", "requires published adapters"),
    ):
        with pytest.raises(HubError, match=says):
            publish_composition(text, ref, AdapterFinder())
    assert store.list(name="ns/new") == []
    publish_composition("ns/a + ns/b", "ns/new@1.0.0", AdapterFinder())
    with pytest.raises(Conflict):
        publish_composition("ns/a", "ns/new@1.0.0", AdapterFinder())


def test_another_base_is_refused_and_drift_has_to_be_allowed(store: Any, stock: Any, tmp_path: Path) -> None:
    import compose.base.model as bases

    moved = bases.load_base(TINY, dtype="fp32")
    with torch.no_grad():
        moved.model.norm.weight.add_(1.0)
    moved.save_pretrained(tmp_path / "moved")
    with pytest.raises(BaseMismatch, match=r"(?s)ns/a was made for builtin:tiny-lm.*\n  ns/a\n  \^\^\^\^"):
        publish_composition("ns/a", "ns/c@1.0.0", AdapterFinder(), base=tmp_path / "moved")
    artifact = publish_composition(
        "ns/a", "ns/c@1.0.0", AdapterFinder(), base=tmp_path / "moved", allow_base_drift=True
    )
    assert artifact.manifest.base.repo == "moved"


# -- merges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "method"),
    [
        ("average(ns/a, ns/b)", "lora", "average"),
        ("0.5 * ns/a - 2 * ns/b", "lora", "sum"),
        ("ties(ns/a, ns/b, rank=7)", "lora", "ties"),
        ("ns/d", "dora", "sum"),
    ],
)
def test_a_merged_adapter_does_what_the_expression_does(
    text: str, kind: str, method: str, store: Any, logits: Any
) -> None:
    artifact, merged = publish_merge(text, "ns/one@1.0.0", AdapterFinder())
    manifest = artifact.manifest
    assert (manifest.type, manifest.kind, manifest.method, manifest.expression) == ("merge", kind, method, text)
    assert manifest.lineage.parents == tuple(f"{ref}@1.0.0" for ref in parse(text).refs)
    assert manifest.requires == ()
    assert manifest.base == store.get("ns/a").manifest.base
    torch.testing.assert_close(logits(load("ns/one")), logits(load(text)), rtol=1e-4, atol=1e-4)
    assert json.loads(artifact.read("certificate.json")) == merged.certificate.as_dict()
    assert "## Certificate" in artifact.read("README.md").decode()
    torch.testing.assert_close(logits(load("ns/one >> ns/i")), logits(load(f"{text} >> ns/i")), rtol=1e-4, atol=1e-4)


def test_a_rank_makes_one_plain_lora_of_mixed_kinds_with_a_certificate(store: Any, logits: Any) -> None:
    text = "ns/a + ns/d"
    exact = logits(load(text))
    losses = []
    for rank in (2, 16):
        artifact, merged = publish_merge(text, f"ns/plain@{rank}", AdapterFinder(), rank=rank)
        assert artifact.manifest.kind == "lora"
        assert artifact.manifest.hyperparameters["certificate"]["discarded"] == pytest.approx(merged.certificate.share)
        losses.append((merged.certificate.share, float((logits(load(f"ns/plain@{rank}")) - exact).abs().max())))
    assert losses[0][0] > 2 * losses[1][0] > 0
    assert losses[0][1] > losses[1][1]
    card = store.get("ns/plain@2").read("README.md").decode()
    assert "| site | rank | energy | left out |" in card


def test_directories_can_be_merged_and_are_no_parents(store: Any, stock: Any, tmp_path: Path, logits: Any) -> None:
    compose.save(stock.adapter("a", seed=3), tmp_path / "loose", model=stock.model)
    finder = AdapterFinder(given={"mine": tmp_path / "loose"})
    artifact, _ = publish_merge("average(mine, ns/a)", "ns/one@1.0.0", finder)
    assert artifact.manifest.lineage.parents == ("ns/a@1.0.0",)
    direct = load("average(mine, ns/a)", adapters={"mine": tmp_path / "loose"})
    torch.testing.assert_close(logits(load("ns/one")), logits(direct), rtol=1e-4, atol=1e-4)


def test_what_has_no_parameters_is_refused_before_anything_is_loaded(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("safetensors.torch.load_file", never)
    monkeypatch.setattr("compose.base.model.load_files", never)
    with pytest.raises(PlanError, match=r"(?s)works on outputs.*\^\^\^\^"):
        publish_merge("ensemble.mean(ns/a, ns/b)", "ns/one@1.0.0", AdapterFinder())
    with pytest.raises(KindError, match=r"prompt 'ns/q' has weight 0\.5"):
        publish_merge("ns/a + 0.5 * ns/q", "ns/one@1.0.0", AdapterFinder())
    with pytest.raises(UsageError, match="which base"):
        publish_merge("identity", "ns/one@1.0.0", AdapterFinder())


def test_merging_what_is_no_change_of_weights_says_so(store: Any) -> None:
    with pytest.raises(KindError, match="ns/n"):
        publish_merge("ns/a + ns/n", "ns/one@1.0.0", AdapterFinder())
    with pytest.raises(KindError):
        publish_merge("ns/n + ns/a", "ns/one@1.0.0", AdapterFinder(), rank=8)
    assert store.list(name="ns/one") == []
