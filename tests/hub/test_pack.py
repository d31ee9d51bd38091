import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hub import gate
from hub.errors import GateError, IntegrityError, ManifestError, NotFound, UsageError
from hub.manifest import Draft, read_manifest
from hub.pack import check_directory, pack
from hub.plugins import Registry

DRAFT = Draft(name="acme/tone", version="1.0", kind="lora")


def test_pack_writes_what_it_returns(files) -> None:
    directory = files()
    manifest = pack(directory, DRAFT)
    assert (directory / "module.json").read_bytes() == manifest.canonical
    assert read_manifest(directory) == manifest == check_directory(directory)
    assert {entry.path: entry.role for entry in manifest.files} == {
        "README.md": "card",
        "adapter_config.json": "config",
        "adapter_model.safetensors": "weights",
    }
    assert manifest.warnings == ()


def test_the_same_bytes_are_the_same_artifact_whenever_they_are_packed(files, tmp_path) -> None:
    directory = files()
    before = shutil.copytree(directory, tmp_path / "copy")
    first = pack(directory, DRAFT)
    os.utime(before / "README.md", (0, 0))
    time.sleep(1.1)  # of the clock nothing is left, not even its seconds
    assert pack(directory, DRAFT) == pack(before, DRAFT) == first
    assert b"created" not in first.canonical
    (directory / "README.md").write_text("other")
    assert pack(directory, DRAFT).digest != first.digest


def test_extra_and_aux_files(files) -> None:
    directory = files()
    (directory / "aux").mkdir()
    (directory / "resume").mkdir()
    save_file({"head": np.ones(3, np.float32)}, directory / "extra.safetensors")
    save_file({"centroid": np.ones(3, np.float32)}, directory / "aux" / "centroid.safetensors")
    (directory / "resume" / "state.json").write_text("{}")
    (directory / ".DS_Store").write_bytes(b"\0")
    manifest = pack(directory, DRAFT)
    roles = {entry.path: entry.role for entry in manifest.files}
    assert roles["extra.safetensors"] == "extra"
    assert roles["aux/centroid.safetensors"] == "aux"
    assert roles["resume/state.json"] == "resume"
    assert ".DS_Store" not in roles
    assert "head" in [entry.name for entry in manifest.tensors]  # extra counts among the parameters
    assert "centroid" not in [entry.name for entry in manifest.tensors]


def test_a_tensor_in_weights_and_extra_is_refused(files) -> None:
    directory = files(tensors={"w": np.ones(3, np.float32)})
    save_file({"w": np.ones(3, np.float32)}, directory / "extra.safetensors")
    with pytest.raises(GateError, match="tensor w stands in adapter_model"):
        pack(directory, DRAFT)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_required_files(files, name: str) -> None:
    directory = files()
    (directory / name).unlink()
    with pytest.raises(GateError, match=f"has no {name}"):
        pack(directory, DRAFT)


def test_a_composition_needs_no_weights(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("a and b")
    manifest = pack(tmp_path, Draft(name="acme/both", version="1.0", type="composition", expression="a + b"))
    assert manifest.tensors == ()


@pytest.mark.parametrize(
    ("values", "zero"),
    [
        ({"x.lora_A.weight": 1, "x.lora_B.weight": 0, "y.lora_B.weight": 0}, "every lora_B is all zero"),
        ({"x.lora_A.weight": 1, "x.lora_B.weight": 0, "y.lora_B.weight": 1}, "1 of 2 lora_B is all zero"),
        ({"e.lora_embedding_A": 1, "e.lora_embedding_B": 0}, "every lora_B is all zero (first: e.lora_embedding_B)"),
    ],
)
def test_zero_factors_are_flagged_in_the_manifest(files, values: dict[str, int], zero: str) -> None:
    manifest = pack(files(tensors={k: np.full((2, 2), v, np.float32) for k, v in values.items()}), DRAFT)
    assert len(manifest.warnings) == 1
    assert zero in manifest.warnings[0]


def test_no_tensors_at_all(files) -> None:
    with pytest.raises(GateError, match="holds no tensor"):
        pack(files(tensors={}), DRAFT)


def test_given_gates_run_and_their_warnings_are_kept(files) -> None:
    seen = []

    def gate(directory, manifest):
        seen.append((directory, manifest.ref))
        assert manifest.digest  # of the manifest without the warnings to come
        return ["looks odd", "looks odd"]

    directory = files()
    manifest = pack(directory, DRAFT, gates=[gate])
    assert seen == [(directory, manifest.ref)]
    assert manifest.warnings == ("looks odd",)
    assert (directory / "module.json").read_bytes() == manifest.canonical
    assert read_manifest(directory).digest == manifest.digest

    def refuse(directory, manifest):
        raise GateError("no key resolves on the base")

    before = (directory / "module.json").read_bytes()
    with pytest.raises(GateError, match="no key resolves"):
        pack(directory, Draft(name="acme/tone", version="2.0", kind="lora"), gates=[refuse])
    assert (directory / "module.json").read_bytes() == before


def test_registered_gates(files, monkeypatch, plugin_package) -> None:
    """A gate is one file, or one entry point of another package; each runs wherever something is packed."""
    folder = plugin_package(
        "hub.own_gates",
        resolves="""
            from hub import gate

            @gate.GATES.register("resolves")
            class Resolves(gate.Gate):
                def check(self, directory, manifest):
                    return [f"saw {manifest.name}", f"saw {manifest.name}"]

            @gate.GATES.register("tried")
            class Tried(gate.Gate):
                needs_base = True

                def check(self, directory, manifest):
                    return ["tried on its base"]
        """,
    )
    monkeypatch.setattr(gate, "GATES", Registry("gate", package=folder, group="hub.own_gates"))
    assert pack(files(), DRAFT).warnings == ("saw acme/tone",)
    assert pack(files(), DRAFT, on_base=True).warnings == ("saw acme/tone", "tried on its base")
    assert gate.GATES.get("resolves").__name__ == "Resolves"
    with pytest.raises(UsageError) as caught:
        gate.GATES.get("resolve")
    assert "did you mean resolves?" in str(caught.value)


def test_a_gate_that_cannot_be_loaded_lets_nothing_through(files, monkeypatch, plugin_package) -> None:
    folder = plugin_package("hub.lost_gates", entry="policy = acme_policy.gate")
    monkeypatch.setattr(gate, "GATES", Registry("gate", package=folder, group="hub.lost_gates"))
    directory = files()
    with pytest.raises(GateError, match=r"the gate 'policy' of acme-policy cannot be loaded .*acme_policy"):
        pack(directory, DRAFT)
    assert not (directory / "module.json").exists()


def test_nothing_is_written_when_a_gate_refuses(files) -> None:
    directory = files(tensors={"w": np.array([np.nan], np.float32)})
    with pytest.raises(GateError, match="w holds 1 NaN"):
        pack(directory, DRAFT)
    assert sorted(path.name for path in directory.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        pack(tmp_path / "absent", DRAFT)
    with pytest.raises(NotFound):
        check_directory(tmp_path)


def change(path: Path, edit) -> None:
    path.write_bytes(edit(path.read_bytes()))


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (
            lambda d: change(d / "adapter_config.json", lambda b: b.replace(b'"lora_alpha": 8', b'"lora_alpha": 800')),
            IntegrityError,
            "adapter_config.json is not the file that was packed",
        ),
        (lambda d: change(d / "README.md", lambda b: b[:-1]), IntegrityError, "truncated to"),
        (lambda d: (d / "README.md").unlink(), NotFound, "lacks README.md"),
        (lambda d: (d / "notes.txt").write_text("x"), GateError, "notes.txt"),
        (lambda d: change(d / "adapter_model.safetensors", lambda b: b[:-4]), IntegrityError, "truncated"),
        (lambda d: change(d / "module.json", lambda b: b[:-1]), ManifestError, "line 1"),
        (lambda d: (d / "module.json").unlink(), NotFound, "module.json"),
    ],
)
def test_changes_after_packing_are_caught(packed, damage, error, words: str) -> None:
    directory, _ = packed()
    damage(directory)
    with pytest.raises(error, match=words):
        check_directory(directory)


def edited(directory: Path, edit) -> None:
    """Change the manifest itself, keeping it well-formed."""
    document = json.loads((directory / "module.json").read_bytes())
    edit(document)
    (directory / "module.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (lambda m: m["tensors"].pop(), GateError, "has extra 1 tensors"),
        (
            lambda m: m["tensors"].append({**m["tensors"][0], "name": "zz"}),
            GateError,
            "misses 1 tensors: zz",
        ),
        (lambda m: m["tensors"][0].update(shape=[64]), IntegrityError, "its manifest says F32"),
        (lambda m: m["tensors"][0].update(dtype="I32"), IntegrityError, "its manifest says I32"),
        (lambda m: m.update(tensors_digest="sha256:" + "0" * 64), IntegrityError, "tensors_digest"),
    ],
)
def test_manifest_that_lies_about_tensors(packed, edit, error, words: str) -> None:
    directory, _ = packed()
    edited(directory, edit)
    with pytest.raises(error, match=words):
        check_directory(directory)
