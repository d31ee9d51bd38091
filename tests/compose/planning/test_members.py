"""The one finder of leaves: in memory, in the store, in a directory; and the one reader, which treats them alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import compose
from compose.algebra import normalize, parse
from compose.errors import PlanError
from compose.planning.members import AdapterFinder, manifest_of, task_of
from compose.planning.plan import plan
from compose.planning.requirements import requirements
from hub.errors import BaseMismatch, HubError, NotFound, UsageError
from hub.store import Store

TINY = "builtin:tiny-lm"


@pytest.fixture
def packed(store: Any, tmp_path: Path) -> Path:
    """ns/a as a directory with its manifest."""
    return store.get("ns/a").materialize(tmp_path / "packed")


@pytest.fixture
def loose(stock: Any, tmp_path: Path) -> Path:
    """An adapter directory that was never packed."""
    return compose.save(stock.adapter("a"), tmp_path / "loose", model=stock.model, task="causal_lm")


def test_a_leaf_is_the_same_wherever_it_lies(store: Any, stock: Any, packed: Path, loose: Path, logits: Any) -> None:
    sources = {
        "memory": stock.adapter("a"),
        "ref": "ns/a",
        "artifact": store.get("ns/a"),
        "packed": packed,
        "loose": loose,
    }
    finder = AdapterFinder(store, sources)
    assert {finder.resolve(name).kind for name in sources} == {"lora"}
    outputs = [logits(compose.load(TINY, name, adapters=sources, dtype="fp32")) for name in sources]
    outputs.append(logits(compose.load(TINY, f'"{loose}"', dtype="fp32")))  # a path in the expression itself
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_packed_directory_is_as_its_artifact(store: Any, packed: Path, loose: Path, tmp_path: Path) -> None:
    assert manifest_of(packed) == store.get("ns/a").manifest
    assert manifest_of(loose) is None
    found = AdapterFinder(store).find(str(packed))
    assert (found.facts.base, found.digest) == (store.get("ns/a").manifest.base, None)
    assert task_of([found.facts], None) == ("causal_lm", None)
    other = compose.load(TINY, dtype="fp32")
    with torch.no_grad():
        other.model.norm.weight.add_(1.0)
    other.save_pretrained(tmp_path / "other")
    other = compose.load(tmp_path / "other")
    for source in (packed, store.get("ns/a")):
        with pytest.raises(BaseMismatch, match="was made for"):
            compose.attach(other, "a", source)
    assert "a" not in other.moduloom.adapters


def test_what_is_no_leaf_is_refused_by_name(store: Any, stock: Any, tmp_path: Path) -> None:
    finder = AdapterFinder(store, {"mine": stock.adapter("a"), "gone": tmp_path / "gone"})
    for text, error, told in (
        ("./nowhere", NotFound, "there is no directory ./nowhere"),
        ("gone", NotFound, "there is no directory"),
        (str(tmp_path), NotFound, "it has no adapter_config.json"),
        ("ns/none", NotFound, "ns/none"),
        ("mine", UsageError, "in memory and has no files"),
    ):
        with pytest.raises(error, match=told):
            finder.find(text)
    with pytest.raises(PlanError, match="merges parameters of one kind"):
        plan(compose.parse("average(mine, ns/q)"), finder.resolve)


def test_a_text_from_elsewhere_reads_no_directory(store: Store, loose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(loose.parent)
    for text in (str(loose), "./loose", "loose", "~"):
        with pytest.raises(HubError) as refused:
            AdapterFinder(store, paths=False).source(text)
        assert "directory" not in refused.value.message
    assert AdapterFinder(store, {"loose": "loose"}, paths=False).source("loose") == Path("loose")  # this one is given


def test_an_artifact_is_one_adapter_however_its_ref_is_written(store: Any) -> None:
    finder = AdapterFinder(store, given={"mine": "ns/a"})
    planned = plan(parse("ns/a + NS/A + 0.5 * Ns/a@1.0.0 + ns/b"), finder.resolve)
    assert planned.expression == normalize(parse("2.5 * ns/a + ns/b"))
    assert list(planned.leaves) == ["ns/a", "ns/b"]
    assert list(plan(parse("ns/a + mine"), finder.resolve).leaves) == ["mine", "ns/a"]  # a name of the caller's own
    assert [need.name for need in requirements(["ns/a", "NS/A@1.0.0"], finder)] == ["ns/a"]
