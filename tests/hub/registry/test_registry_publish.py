"""How a repository maps onto artifacts: the rules of `hub.registry`, one by one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hub.manifest import Draft, Manifest
from hub.pack import pack

WEIGHTS = "adapter_model.safetensors"


def contents(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_a_plain_peft_directory_becomes_an_artifact(site, files, send_directory, tag) -> None:
    directory = files("tone")
    (directory / "README.md").write_text("---\nlicense: mit\nlanguage: [en, de]\nbase_model: guess/me\n---\n# Tone\n")
    config = {"peft_type": "LORA", "use_dora": True, "task_type": "SEQ_CLS", "r": 4, "lora_alpha": 8}
    (directory / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
    send_directory(site, "acme/tone", directory)
    answer = tag(site, "acme/tone", "v1.0")
    manifest = site.store.get("acme/tone").manifest
    assert answer.json() == {"name": "v1.0", "targetCommit": answer.json()["targetCommit"], "digest": manifest.digest}
    assert (str(manifest.ref), manifest.kind, manifest.task) == ("acme/tone@1.0", "dora", "classification")
    assert (manifest.license, manifest.languages) == ("mit", ("en", "de"))
    assert manifest.base is None  # a name in a config identifies no weights, and nothing is invented
    assert any("base is unknown" in warning and "org/base" in warning for warning in manifest.warnings)
    assert site.store.verify() == []


def test_a_manifest_for_this_version_arrives_unchanged(site, packed, send_directory, tag, base_identity) -> None:
    directory, manifest = packed("acme/tone@2.1.0", base=base_identity, domains=("law",), summary="tone of voice")
    send_directory(site, "acme/tone", directory)
    assert tag(site, "acme/tone", "2.1.0").json()["digest"] == manifest.digest
    assert site.store.get("acme/tone@2.1.0").manifest == manifest


def test_two_registries_call_an_artifact_by_the_same_commit(site, serve, tmp_path, packed, send_directory, tag) -> None:
    directory, _ = packed("acme/tone@1.0.0")
    send_directory(site, "acme/tone", directory)
    here = tag(site, "acme/tone", "1.0.0").json()["targetCommit"]
    with serve(tmp_path / "other") as other:
        other.store.put(directory)  # published on the server itself, without any commit
        assert other.ask("/api/models/acme/tone").json()["sha"] == here
        assert site.ask("/api/models/acme/tone").json()["sha"] == here


def test_main_is_the_newest_version_or_the_draft_after_it(site, files, send_directory, tag, store) -> None:
    def main():
        return site.ask("/api/models/acme/tone").json()["sha"]

    first = send_directory(site, "acme/tone", files(seed=1))
    assert main() == first
    released = tag(site, "acme/tone", "2.0.0").json()["targetCommit"]
    assert main() == released
    draft = send_directory(site, "acme/tone", files(seed=2))
    assert main() == draft
    assert site.ask("/api/models/acme/tone/revision/latest").json()["sha"] == released
    backport = tag(site, "acme/tone", "1.5.0").json()["targetCommit"]
    assert main() == released != backport
    assert site.ask(f"/api/models/acme/tone/revision/{draft}").json()["sha"] == draft
    digest = site.store.get("acme/tone@1.5.0").digest
    for name in ("1.5", "1.5.0", digest, backport, backport[:10]):
        assert site.ask(f"/api/models/acme/tone/revision/{name}").json()["sha"] == backport


def test_yanked_versions_leave_main_but_stay_pinned(site, publish, store, serve) -> None:
    publish("acme/tone@1.0")
    publish("acme/tone@1.1", seed=1)
    with serve(store.root) as found:
        newest = found.ask("/api/models/acme/tone").json()["sha"]
        assert found.ask("/api/models/acme/tone/tag/1.1", "DELETE").status == 200
        assert found.ask("/api/models/acme/tone").json()["sha"] != newest
        assert found.ask("/api/models/acme/tone/revision/1.1").json()["sha"] == newest
        refs = found.ask("/api/models/acme/tone/refs").json()
        assert [ref["name"] for ref in refs["tags"]] == ["1.0"]
        assert refs["converts"] == [{"name": "yanked/1.1", "ref": "refs/yanked/1.1", "targetCommit": newest}]
        assert found.ask("/api/models/acme/tone/tag/1.0", "DELETE").status == 200
        assert found.ask("/api/models/acme/tone/tree/main").json() == []  # nothing is offered any more


def test_a_stale_manifest_keeps_facts_that_still_hold(site, packed, send_commit, send_directory, tag, base_identity):
    directory, old = packed("acme/tone@1.0.0", base=base_identity, labels=("no", "yes"))
    send_directory(site, "acme/tone", directory)
    tag(site, "acme/tone", "1.0.0")
    send_commit(site, "acme/tone", {"README.md": b"# better words\n"})  # module.json is inherited, and stale
    assert tag(site, "acme/tone", "1.0.1").status == 200
    new = site.store.get("acme/tone@1.0.1").manifest
    assert (new.base, new.labels, new.tensors_digest) == (old.base, old.labels, old.tensors_digest)
    assert new.version == "1.0.1" and new.file("README.md") != old.file("README.md")


def test_a_stale_manifest_is_dropped_when_the_weights_changed(site, packed, files, send_commit, send_directory, tag):
    directory, old = packed("acme/tone@1.0.0", summary="made of other weights", method="magic")
    send_directory(site, "acme/tone", directory)
    tag(site, "acme/tone", "1.0.0")
    send_commit(site, "acme/tone", {WEIGHTS: (files("other", seed=9) / WEIGHTS).read_bytes()})
    assert tag(site, "acme/tone", "2.0.0").status == 200
    new = site.store.get("acme/tone@2.0.0").manifest
    assert (new.summary, new.method, new.base) == ("", "", None)
    assert new.tensors_digest != old.tensors_digest


def test_the_same_bytes_may_be_published_again_as_another_version(site, packed, send_directory, tag) -> None:
    directory, _ = packed("acme/tone@1.0.0", summary="kept")
    send_directory(site, "acme/tone", directory)
    tag(site, "acme/tone", "1.0.0")
    assert tag(site, "acme/tone", "1.0.1", revision="1.0.0").status == 200
    assert site.store.get("acme/tone@1.0.1").manifest.summary == "kept"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: (d / "README.md").write_text("changed"), "README.md is not the file that module.json lists"),
        (lambda d: (d / "notes.txt").write_text("more"), "does not list notes.txt"),
        (lambda d: (d / "README.md").unlink(), "there is no README.md, which module.json lists"),
        (lambda d: pack(d, Draft(name="acme/tone", version="3.0.0", kind="lora")), "is that of acme/tone@3.0.0"),
        (lambda d: pack(d, Draft(name="bob/tone", version="1.0.0", kind="lora")), "is that of bob/tone@1.0.0"),
        (lambda d: (d / "module.json").write_text("{}"), "module.json"),
        (lambda d: (d / "module.json").write_text('{"name": NaN}'), "NaN"),
        (lambda d: (d / "adapter_config.json").write_text("[]"), "not"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(site, packed, send_directory, tag, change, said) -> None:
    directory, _ = packed("acme/tone@1.0.0")
    change(directory)
    commit = send_directory(site, "acme/tone", directory)
    answer = tag(site, "acme/tone", "1.0.0")
    assert answer.status == 400 and said in answer.json()["error"]
    assert site.store.names() == []
    assert site.ask("/api/models/acme/tone").json()["sha"] == commit  # the draft is as it was
    assert list((site.store.root / "registry" / "tmp").iterdir()) == []


def nan() -> dict[str, np.ndarray]:
    return {"base_model.model.x.lora_A.weight": np.array([[1.0, np.nan]], np.float32)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: save_file(nan(), d / WEIGHTS), "holds 1 NaN or Inf"),
        (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-3]), "truncated"),
        (lambda d: (d / WEIGHTS).write_bytes(b"\x80\x04" + b"x" * 100), "safetensors"),
        (lambda d: (d / WEIGHTS).unlink(), "no adapter_model.safetensors"),
        (lambda d: (d / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda d: (d / "adapter_config.json").write_text('{"peft_type": "WARP"}'), "'WARP'"),
        (lambda d: (d / "notes.txt").write_bytes(b"\x80\x04pickle"), "pickle"),
    ],
)
def test_the_push_gates_hold_for_plain_directories(site, files, send_directory, tag, change, said) -> None:
    directory = files("tone")
    change(directory)
    send_directory(site, "acme/tone", directory)
    answer = tag(site, "acme/tone", "1.0.0")
    assert answer.status == 400 and said in answer.json()["error"], answer.json()
    assert site.store.names() == []


@pytest.mark.parametrize(
    "path", ["pytorch_model.bin", "a/training_args.bin", "x.pkl", "model.py", "a.zip", "tokenizer"]
)
def test_pickles_and_code_never_get_in(site, send_commit, path) -> None:
    answer = send_commit(site, "acme/tone", {"README.md": b"# x\n", path: b"x"})
    assert answer.status == 400 and path in answer.json()["error"]
    assert site.ask("/api/models/acme/tone").json()["siblings"] == []
    asked = {"files": [{"path": path, "size": 1, "sample": ""}]}
    assert site.ask("/api/models/acme/tone/preupload/main", "POST", asked).status == 400


def test_what_git_leaves_behind_is_left_out(site, send_commit) -> None:
    answer = send_commit(site, "acme/tone", {"README.md": b"# x\n", ".gitattributes": b"* x", ".gitignore": b"*"})
    assert answer.status == 200
    assert [file["rfilename"] for file in site.ask("/api/models/acme/tone").json()["siblings"]] == ["README.md"]


def test_aliases_and_tags_of_drafts(site, files, send_directory, tag) -> None:
    draft = send_directory(site, "acme/tone", files(seed=1))
    assert tag(site, "acme/tone", "trial").status == 200  # a fixed name of the draft
    released = tag(site, "acme/tone", "1.0.0").json()["targetCommit"]
    assert tag(site, "acme/tone", "prod", "1.0.0").status == 200
    assert site.store.catalogue("acme/tone").aliases == {"prod": site.store.get("acme/tone").digest}
    refs = {ref["name"]: ref["targetCommit"] for ref in site.ask("/api/models/acme/tone/refs").json()["tags"]}
    assert refs == {"1.0.0": released, "prod": released, "trial": draft}
    for label in ("trial", "prod", "main", "latest", "1.0"):
        assert tag(site, "acme/tone", label).status == 409
    for label in ("Prod", "a b", "../x", "x" * 200, "sha256:" + "0" * 64, "", "@x", "1!2.0", "1.0+cu"):
        assert tag(site, "acme/tone", label).status == 400, label
    for label in ("trial", "prod"):
        assert site.ask(f"/api/models/acme/tone/tag/{label}", "DELETE").status == 200
        assert site.ask(f"/api/models/acme/tone/tag/{label}", "DELETE").status == 404


def test_an_empty_repository_cannot_be_tagged(site, tag) -> None:
    site.ask("/api/repos/create", "POST", {"name": "tone", "organization": "acme"})
    assert tag(site, "acme/tone", "1.0.0").status == 400
    assert tag(site, "acme/tone", "prod").status == 400
    assert site.store.names() == []


def test_parent_commits(site, files, send_directory, send_commit, tag) -> None:
    first = send_directory(site, "acme/tone", files(seed=1))
    tag(site, "acme/tone", "1.0.0")
    released = site.ask("/api/models/acme/tone").json()["sha"]
    # The draft and the release made of it are one: who pushed and tagged may go on from either.
    second = send_commit(site, "acme/tone", {"notes.txt": b"a"}, parent=first)
    assert second.status == 200
    assert send_commit(site, "acme/tone", {"notes.txt": b"b"}, parent=first).status == 412
    assert send_commit(site, "acme/tone", {"notes.txt": b"b"}, parent=released).status == 412
    assert send_commit(site, "acme/tone", {"notes.txt": b"b"}, parent=second.json()["commitOid"][:8]).status == 200


def test_a_commit_that_changes_nothing_is_no_commit(site, files, send_directory) -> None:
    first = send_directory(site, "acme/tone", files(seed=1))
    assert send_directory(site, "acme/tone", files(seed=1)) == first
    assert len(site.ask("/api/models/acme/tone/commits/main").json()) == 1


def test_trees_that_no_directory_can_hold(site, send_commit) -> None:
    assert send_commit(site, "acme/tone", {"a.txt": b"x", "A.txt": b"y"}).status == 400
    assert send_commit(site, "acme/tone", {"aux": b"x"}).status == 400
    assert send_commit(site, "acme/tone", {"LICENSE": b"x", "LICENSE/b.txt": b"y"}).status == 400
    assert site.ask("/api/models/acme/tone").json()["siblings"] == []


def test_drafts_take_no_second_copy_when_published(site, files, send_directory, tag) -> None:
    send_directory(site, "acme/tone", files(seed=1))
    tag(site, "acme/tone", "1.0.0")
    entry = site.store.get("acme/tone").manifest.file(WEIGHTS)
    draft, published = site.context.repos.drafts.blobs.path(entry.digest), site.store.blobs.path(entry.digest)
    assert draft.stat().st_ino == published.stat().st_ino


def test_sweeping_keeps_what_is_named(site, files, send_directory, send_commit, tag) -> None:
    drafts = site.context.repos.drafts
    old = send_directory(site, "acme/tone", files(seed=1))
    send_commit(site, "acme/tone", {"notes.txt": b"newer"})
    stray = drafts.root / "blobs" / "sha256" / ("0" * 64)
    stray.write_bytes(b"left by a kill")
    assert drafts.sweep() == 0  # young: someone may be about to name it
    assert drafts.sweep(now=2 * 3600 + stray.stat().st_mtime) == 1
    assert site.ask(f"/api/models/acme/tone/revision/{old}").status == 200
    drafts.sweep(now=4000 * 86400 + stray.parent.stat().st_mtime)
    assert site.ask(f"/api/models/acme/tone/revision/{old}").status == 200  # somebody may have pinned it
    drafts.keep = 30 * 86400.0  # unless the registry is told otherwise
    assert drafts.sweep(now=40 * 86400 + stray.parent.stat().st_mtime) == 0  # the head still names every blob of `old`
    assert site.ask(f"/api/models/acme/tone/revision/{old}").status == 404
    assert site.ask("/acme/tone/resolve/main/README.md").body == b"# tone\n"


def test_a_model_can_live_in_a_draft_but_is_no_version(site, send_commit, tag) -> None:
    send_commit(site, "acme/model", {"config.json": b"{}", "model.safetensors": b"x"})
    assert tag(site, "acme/model", "1.0.0").status == 400
    assert tag(site, "acme/model", "good").status == 200


def test_the_manifest_file_is_the_digest(site, packed, send_directory, tag) -> None:
    directory, manifest = packed("acme/tone@1.0.0")
    send_directory(site, "acme/tone", directory)
    tag(site, "acme/tone", "1.0.0")
    data = site.ask("/acme/tone/resolve/1.0.0/module.json").body
    assert Manifest.parse(data) == manifest and data == manifest.canonical
