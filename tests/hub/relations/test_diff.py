"""`hub diff`, `hub tree` and the reading of tensors as numbers."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

from hub.cli import main
from hub.contents.tensor_files import read_header
from hub.contents.tensor_values import distance, numbers
from hub.ref import AdapterRef
from hub.relations.diff import diff, side
from hub.store import Store


def run(*words: str) -> Result:
    return CliRunner().invoke(main, list(words), catch_exceptions=False)


@pytest.fixture
def store(hub_home: Path) -> Store:
    return Store(hub_home)


def raw(path: Path, dtype: str, data: bytes, shape: list[int]) -> Path:
    header = json.dumps({"t": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize("dtype", ["BF16", "F8_E5M2", "F8_E4M3", "F16", "F64", "I8", "BOOL"])
def test_numbers_are_those_torch_reads(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    names = {"BF16": "bfloat16", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F16": "float16"}
    names |= {"F64": "float64", "I8": "int8", "BOOL": "bool"}
    codes = torch.arange(65536).to(torch.int16) if dtype in ("BF16", "F16") else torch.arange(256).to(torch.uint8)
    if dtype == "BOOL":
        codes = codes % 2
    if dtype == "F64":
        codes = torch.randn(100, dtype=torch.float64)
    wanted = codes.view(getattr(torch, names[dtype])).to(torch.float64)
    path = raw(tmp_path / "t.safetensors", dtype, codes.numpy().tobytes(), [len(wanted)])
    found = np.concatenate(list(numbers(path, read_header(path).tensors[0])))
    np.testing.assert_array_equal(found, wanted.numpy())


def test_distance_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hub.contents.tensor_values._PART", 7)
    random = np.random.default_rng(0)
    a, b = random.normal(size=(6, 9)).astype(np.float32), random.normal(size=(6, 9)).astype(np.float64)
    save_file({"t": a}, tmp_path / "a.safetensors")
    save_file({"t": b}, tmp_path / "b.safetensors")
    places = [(tmp_path / f"{n}.safetensors", read_header(tmp_path / f"{n}.safetensors").tensors[0]) for n in "ab"]
    found = distance(*places)
    gap = b - a
    assert found.difference == pytest.approx(np.linalg.norm(gap))
    assert found.relative == pytest.approx(np.linalg.norm(gap) / np.linalg.norm(a))
    assert found.cosine == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    assert found.largest == pytest.approx(np.abs(gap).max())
    zero = distance(places[0], places[0])
    assert zero.difference == zero.largest == 0
    assert zero.cosine == pytest.approx(1)


def test_diff_names_every_difference(store: Store, files, packed) -> None:
    metrics = ({"dataset": "d", "metric": "accuracy", "value": 0.5}, {"dataset": "d", "metric": "f1", "value": 0.4})
    store.put(packed("acme/tone@1.0.0", metrics=metrics, license="MIT")[0])
    directory, _ = packed("acme/tone@1.1.0", metrics=metrics[:1])
    tensors = {"p.lora_A.weight": np.ones((4, 16), np.float32), "new": np.ones(3, np.float32)}
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text('{"lora_alpha": 16, "peft_type": "LORA", "r": 4, "x": {"y": 1}}')
    assert run("push", "--no-trial", str(directory), "--repack").exit_code == 0
    found = diff(side("acme/tone@1.0.0", store), side("acme/tone@1.1.0", store))
    assert found.config == {"lora_alpha": (8, 16), "x.y": (None, 1)}
    assert found.facts == {"license": ("MIT", None)}
    assert found.added == ("new", "p.lora_A.weight")
    assert [name.rsplit("q_proj.")[1] for name in found.removed] == ["lora_A.weight", "lora_B.weight"]
    assert [(m.metric, m.before, m.after) for m in found.metrics] == [("f1", 0.4, None)]
    assert list(found.files) == ["README.md"]


def test_changed_tensors_carry_norms(store: Store, files) -> None:
    a, b = files("a"), files("b", seed=1)
    found = diff(side(str(a), store), side(str(b), store))
    assert len(found.changed) == 2
    assert all(change.distance.difference > 0 for change in found.changed)
    document = json.loads(run("diff", str(a), str(b), "--json").stdout)
    assert document["changed"][0]["relative"] == pytest.approx(found.changed[0].distance.relative)
    text = run("diff", str(a), str(b)).stdout
    assert "2 tensors changed, 0 added, 0 removed, 0 equal" in text
    save_file({"t": np.ones((2, 3), np.float32)}, a / "adapter_model.safetensors")
    save_file({"t": np.ones((2, 4), np.float16)}, b / "adapter_model.safetensors")
    assert "2x3 -> 2x4 F32 -> F16" in run("diff", str(a), str(b)).stdout


def test_what_is_the_same_says_so(store: Store, packed) -> None:
    directory, _ = packed()
    store.put(directory)
    result = run("diff", "acme/tone", str(directory))
    assert "the same in all that counts" in result.stderr
    assert run("diff", "acme/tone", str(directory.parent)).exit_code == 1


@pytest.fixture
def lineage(store: Store, packed) -> Store:
    """both requires a and b; a 1.1 comes from a 1.0; b requires something that is nowhere."""
    store.put(packed("acme/a@1.0")[0])
    a = store.put(packed("acme/a@1.1", seed=1, lineage={"parents": ["acme/a@1.0"]})[0])
    store.put(packed("acme/b@1.0", seed=2, requires=({"name": "acme/gone", "range": ">=2"},))[0])
    needs = ({"name": "acme/a", "digest": a.digest}, {"name": "acme/b"})
    facts = {"expression": "acme/a + acme/b", "requires": needs, "lineage": {"parents": ["acme/a@1.1", "acme/b@1.0"]}}
    store.put(packed("acme/both@1.0", seed=3, type="composition", **facts)[0])
    return store


def test_tree_as_text(lineage: Store) -> None:
    assert run("tree", "acme/both").stdout.splitlines() == [
        "acme/both@1.0 (lora)",
        "├── requires acme/a@1.1 (lora)",
        "│   └── from acme/a@1.0 (lora)",
        "└── requires acme/b@1.0 (lora)",
        "    └── requires acme/gone>=2 (missing)",
    ]
    lineage.yank(AdapterRef.parse("acme/both@1.0"), "wrong")
    assert run("tree", "acme/a@1.0", "--invert").stdout.splitlines() == [
        "acme/a@1.0 (lora)",
        "└── parent of acme/a@1.1 (lora)",
        "    └── required by acme/both@1.0 (lora, yanked: wrong)",
    ]


def test_tree_as_graphs(lineage: Store) -> None:
    document = json.loads(run("tree", "acme/both", "--json").stdout)
    assert document == json.loads(run("tree", "acme/both", "--format", "json").stdout)
    refs = {node["id"]: node["ref"] for node in document["nodes"]}
    assert {(refs[e["source"]], e["relation"], refs[e["target"]]) for e in document["edges"]} == {
        ("acme/both@1.0", "requires", "acme/a@1.1"),
        ("acme/both@1.0", "requires", "acme/b@1.0"),
        ("acme/a@1.1", "parent", "acme/a@1.0"),
        ("acme/b@1.0", "requires", "acme/gone>=2"),
    }
    root = ElementTree.fromstring(run("tree", "acme/both", "--format", "svg").stdout)
    assert "acme/a@1.1" in "".join(root.itertext())
    dot = run("tree", "acme/both", "--format", "dot").stdout
    assert dot.count("->") == 4
    assert 'label="acme/gone>=2 (missing)", style=dashed' in dot


def test_a_cycle_of_requirements_ends(store: Store, packed) -> None:
    for name, need, seed in (("a", "acme/b", 0), ("b", "acme/a", 1)):
        facts = {"type": "composition", "expression": need, "requires": ({"name": need},), "seed": seed}
        store.put(packed(f"acme/{name}@1.0", **facts)[0])
    assert run("tree", "acme/a").stdout.splitlines() == [
        "acme/a@1.0 (lora)",
        "└── requires acme/b@1.0 (lora)",
        "    └── requires acme/a@1.0 (lora) (above)",
    ]
