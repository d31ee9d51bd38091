"""Stock huggingface_hub against a registry, unchanged: each script runs in a process of its own."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

# With hf_xet installed (the default) a client uploads through its streamed pipeline, without it in one commit.
WAYS = {"xet": {}, "no_xet": {"HF_HUB_DISABLE_XET": "1"}}


@pytest.fixture(params=sorted(WAYS))
def way(request) -> dict[str, str]:
    return WAYS[request.param]


def test_push_tag_pull(site, files, way) -> None:
    directory = files("tone")
    found = site.stock(
        f"""
from huggingface_hub.utils._runtime import is_xet_available
url = api.create_repo("acme/tone")
assert api.create_repo("acme/tone", exist_ok=True) == url
commit = api.upload_folder(repo_id="acme/tone", folder_path={str(directory)!r}, commit_message="first")
api.create_tag("acme/tone", tag="1.0.0", revision=commit.oid)
api.create_tag("acme/tone", tag="1.0.0", exist_ok=True)
path = snapshot_download("acme/tone", revision="1.0.0")
files = {{p: open(f"{{path}}/{{p}}", "rb").read().hex() for p in api.list_repo_files("acme/tone", revision="1.0.0")}}
check = api.verify_repo_checksums("acme/tone", revision="1.0.0")
print(json.dumps(dict(
    xet=is_xet_available(), url=url, commit=commit.oid, url_of_commit=commit.commit_url, files=files,
    checked=check.checked_count, mismatches=check.mismatches,
    refs=[t.name for t in api.list_repo_refs("acme/tone").tags],
    info=api.model_info("acme/tone").sha, tagged=api.list_repo_refs("acme/tone").tags[0].target_commit,
)))
""",
        **way,
    )
    assert found["xet"] is (way == {})
    assert found["url"] == f"{site.url}/acme/tone"
    assert found["url_of_commit"] == f"{site.url}/acme/tone/commit/{found['commit']}"
    assert found["refs"] == ["1.0.0"]
    assert found["info"] == found["tagged"] != found["commit"]  # the release has a module.json besides
    assert (found["checked"], found["mismatches"]) == (4, [])
    assert set(found["files"]) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "module.json"}
    for path in directory.iterdir():
        assert bytes.fromhex(found["files"][path.name]) == path.read_bytes()
    artifact = site.store.get("acme/tone@1.0.0")
    assert f"sha256:{hashlib.sha256(bytes.fromhex(found['files']['module.json'])).hexdigest()}" == artifact.digest
    assert site.store.verify() == []


def test_everyday_calls(site, files) -> None:
    one, two = files("one", seed=1), files("two", seed=2)
    found = site.stock(
        f"""
api.create_repo("acme/tone")
first = api.upload_folder(repo_id="acme/tone", folder_path={str(one)!r})
same = api.upload_folder(repo_id="acme/tone", folder_path={str(one)!r})
api.create_tag("acme/tone", tag="1.0.0")
api.upload_folder(repo_id="acme/tone", folder_path={str(two)!r}, delete_patterns=["*.md"], parent_commit=first.oid)
api.create_tag("acme/tone", tag="1.1.0")
api.create_tag("acme/tone", tag="prod", revision="1.0.0")
api.upload_file(path_or_fileobj=b"law\\n", path_in_repo="aux/notes.txt", repo_id="acme/tone")
api.delete_file("README.md", "acme/tone")
draft = api.list_repo_files("acme/tone")
tree = [(type(e).__name__, e.path) for e in api.list_repo_tree("acme/tone", expand=True)]
deep = [e.path for e in api.list_repo_tree("acme/tone", path_in_repo="aux")]
paths = api.get_paths_info("acme/tone", ["aux", "adapter_model.safetensors", "nope"])
api.delete_folder("aux", "acme/tone")
log = [c.title for c in api.list_repo_commits("acme/tone")]
weights = [p for p in paths if p.path.endswith(".safetensors")][0]
print(json.dumps(dict(
    same=same.oid == first.oid, draft=draft, tree=tree, deep=deep, paths=[p.path for p in paths], log=log,
    lfs=[weights.lfs.sha256, weights.lfs.size, weights.size], after=api.list_repo_files("acme/tone"),
    exists=[api.file_exists("acme/tone", p) for p in ("adapter_config.json", "README.md")]
        + [api.repo_exists(r) for r in ("acme/tone", "acme/nope")]
        + [api.revision_exists("acme/tone", r) for r in ("1.0", "prod", "latest", "nope", first.oid, first.oid[:9])],
    models=[(m.id, m.tags) for m in api.list_models()], filtered=[[m.id for m in api.list_models(**k)] for k in (
        dict(search="ton"), dict(search="x"), dict(author="acme"), dict(author="bob"), dict(filter="lora"),
        dict(filter="license:mit"), dict(filter="base_model:acme/base"), dict(limit=1))],
    sizes=sum(s.size for s in api.model_info("acme/tone", revision="1.0.0", files_metadata=True).siblings),
    default=open(hf_hub_download("acme/tone", "README.md", revision="prod")).read(),
)))
"""
    )
    assert found["same"] is True  # nothing changed, so there is no empty commit
    assert found["draft"] == ["adapter_config.json", "adapter_model.safetensors", "aux/notes.txt", "module.json"]
    assert ["RepoFolder", "aux"] in found["tree"]
    assert found["deep"] == ["aux/notes.txt"]
    assert found["paths"] == ["aux", "adapter_model.safetensors"]
    weights = (two / "adapter_model.safetensors").read_bytes()
    assert found["lfs"] == [hashlib.sha256(weights).hexdigest(), len(weights), len(weights)]
    assert found["after"] == ["adapter_config.json", "adapter_model.safetensors", "module.json"]
    assert found["log"][0] == "Delete folder aux with huggingface_hub"
    assert found["log"][-2:] == ["acme/tone 1.1.0", "acme/tone 1.0.0"]
    assert found["exists"] == [True, False, True, False, True, True, True, False, True, True]
    assert [m[0] for m in found["models"]] == ["acme/tone"]
    assert {"lora", "peft"} <= set(found["models"][0][1])
    assert found["filtered"] == [["acme/tone"], [], ["acme/tone"], [], ["acme/tone"], [], [], ["acme/tone"]]
    assert found["sizes"] == sum(file.size for file in site.context.repos.resolve("acme/tone", "1.0.0").tree.values())
    assert found["default"] == "# one\n"


def test_what_a_client_wrote_is_what_it_reads(site, files) -> None:
    """Tags, gates, messages, cards and the commit of each file: as they were written, not as they are kept."""
    directory = files("tone")
    (directory / "README.md").write_text("---\nlicense: mit\ntags: [legal, own]\ndate: 2026-01-02\n---\n# tone\n")
    found = site.stock(
        f"""
api.create_repo("acme/tone")
first = api.upload_folder(repo_id="acme/tone", folder_path={str(directory)!r}, commit_message="first")
api.upload_file(path_or_fileobj=b"a\\n", path_in_repo="aux/a.txt", repo_id="acme/tone", commit_message="add a")
second = api.upload_file(path_or_fileobj=b"b\\n", path_in_repo="aux/b.txt", repo_id="acme/tone",
    commit_message="add b\\n\\nbecause", commit_description="of c")
tree = {{e.path: e.last_commit.title for e in api.list_repo_tree("acme/tone", recursive=True, expand=True)}}
some = {{e.path: e.last_commit.oid for e in api.get_paths_info("acme/tone", ["README.md", "aux"], expand=True)}}
log = [(c.title, c.message) for c in api.list_repo_commits("acme/tone")][:1]
api.create_tag("acme/tone", tag="v1.0")
tags = lambda: [t.name for t in api.list_repo_refs("acme/tone").tags]
written = tags()
again = api.create_tag("acme/tone", tag="v1.0", exist_ok=True)
api.create_tag("acme/tone", tag="1.0", exist_ok=True)
both = tags()
read = [len(api.list_repo_files("acme/tone", revision=r)) for r in ("v1.0", "1.0", "1.0.0")]
gates = []
for gate in ("auto", "manual", False):
    api.update_repo_settings("acme/tone", gated=gate)
    gates.append(api.model_info("acme/tone").gated)
info = api.model_info("acme/tone")
api.delete_tag("acme/tone", tag="v1.0")
print(json.dumps(dict(tree=tree, some=[some["README.md"] == first.oid, some["aux"] == second.oid], log=log,
    written=written, both=both, read=read, none=tags(), gates=gates, card=info.card_data.to_dict(),
    tags=info.tags)))
"""
    )
    assert found["tree"] == {
        **dict.fromkeys(("README.md", "adapter_config.json", "adapter_model.safetensors"), "first"),
        "aux": "add b",
        "aux/a.txt": "add a",
        "aux/b.txt": "add b",
    }
    assert found["some"] == [True, True]
    assert found["log"] == [["add b", "because\n\nof c"]]
    assert (found["written"], found["both"], found["none"]) == (["v1.0"], ["v1.0"], [])
    assert found["read"] == [6, 6, 6]  # with module.json
    assert found["gates"] == ["auto", "manual", False]
    assert found["card"] == {"license": "mit", "tags": ["legal", "own"], "date": "2026-01-02"}
    assert {"legal", "own", "lora"} <= set(found["tags"])
    assert site.store.catalogue("acme/tone").releases[0].yanked  # its tag is gone


def test_capitals_in_names(site, files) -> None:
    """Accounts and repositories of the Hub have them: kept as they were written, found however they are written."""
    directory = files("tone")
    found = site.stock(
        f"""
api.create_repo("Acme/My-Tone")
api.create_repo("acme/my-tone", exist_ok=True)
api.upload_folder(repo_id="acme/MY-tone", folder_path={str(directory)!r})
draft = [m.id for m in api.list_models()]
api.create_tag("acme/my-tone", tag="1.0.0")
api.update_repo_settings("acme/my-tone", gated="auto")
print(json.dumps(dict(draft=draft, models=[m.id for m in api.list_models(author="acme", search="TONE")],
    info=[(i.id, i.sha, i.gated) for i in map(api.model_info, ("Acme/My-Tone", "acme/my-tone"))],
    tags=[t.name for t in api.list_repo_refs("ACME/MY-TONE").tags])))
"""
    )
    assert found["draft"] == found["models"] == ["Acme/My-Tone"]
    assert found["info"][0] == found["info"][1]
    assert found["info"][0][0::2] == ["Acme/My-Tone", "auto"]
    assert found["tags"] == ["1.0.0"]
    assert str(site.store.get("acme/my-tone").ref) == "Acme/My-Tone@1.0.0"
    assert b"Acme/My-Tone" in site.ask("/acme/my-tone", headers={"Accept": "text/html"}).body


@pytest.mark.parametrize("name", ["acme/tone.git", "api/tone", "static/tone", "LFS/tone"])
def test_names_that_addresses_need_are_refused_by_name(site, name: str) -> None:
    namespace, short = name.split("/")
    answer = site.ask("/api/repos/create", "POST", {"organization": namespace, "name": short})
    assert answer.status == 400
    assert repr(short if short.endswith(".git") else namespace) in answer.json()["error"]


def test_who_changed_a_file_is_known_across_versions(site, files) -> None:
    one, two = files("one", seed=1), files("two", seed=2)
    found = site.stock(
        f"""
api.create_repo("acme/tone")
for number, folder in enumerate(({str(one)!r}, {str(two)!r}), start=1):
    api.upload_folder(repo_id="acme/tone", folder_path=folder)
    api.create_tag("acme/tone", tag=f"v{{number}}")
print(json.dumps({{e.path: e.last_commit.title for e in api.list_repo_tree("acme/tone", expand=True)}}))
"""
    )
    assert found == {
        "README.md": "acme/tone 2",
        "adapter_config.json": "acme/tone 1",
        "adapter_model.safetensors": "acme/tone 2",
        "module.json": "acme/tone 2",
    }


def test_errors_are_those_of_the_real_hub(site, files) -> None:
    directory = files("tone")
    found = site.stock(
        f"""
import huggingface_hub.errors as errors
def kind(call):
    try:
        call()
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        return [type(error).__name__, status]
api.create_repo("acme/tone")
commit = api.upload_folder(repo_id="acme/tone", folder_path={str(directory)!r})
api.create_tag("acme/tone", tag="1.0.0")
print(json.dumps([
    kind(lambda: api.create_repo("acme/tone")),
    kind(lambda: api.model_info("acme/nope")),
    kind(lambda: api.model_info("gpt2")),
    kind(lambda: api.dataset_info("acme/tone")),
    kind(lambda: api.model_info("acme/tone", revision="9.9")),
    kind(lambda: hf_hub_download("acme/tone", "nope.txt")),
    kind(lambda: hf_hub_download("acme/tone", "nope.txt", revision="nope")),
    kind(lambda: api.create_tag("acme/tone", tag="1.0.0")),
    kind(lambda: api.create_tag("acme/tone", tag="2.0.0", revision="nope")),
    kind(lambda: api.create_tag("acme/tone", tag="Not a tag")),
    kind(lambda: api.delete_tag("acme/tone", tag="nope")),
    kind(lambda: api.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="acme/tone", revision="1.0.0")),
    kind(lambda: api.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="acme/nope")),
    kind(lambda: api.upload_file(path_or_fileobj=b"x", path_in_repo="a.bin", repo_id="acme/tone")),
    kind(lambda: api.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="acme/tone", create_pr=True)),
    kind(lambda: api.upload_file(
        path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="acme/tone", parent_commit="0" * 40)),
    kind(lambda: api.upload_file(
        path_or_fileobj=b"---\\n[x\\n---\\n", path_in_repo="README.md", repo_id="acme/tone")),
    kind(lambda: api.delete_file("nope.txt", "acme/tone")),
    kind(lambda: api.create_repo("acme/data", repo_type="dataset")),
    kind(lambda: api.create_repo("acme/tone_")),
    kind(lambda: api.delete_repo("acme/nope")),
    kind(lambda: api.create_branch("acme/tone", branch="main")),
    kind(lambda: api.delete_branch("acme/tone", branch="main")),
    kind(lambda: api.move_repo("acme/tone", "acme/other")),
]))
"""
    )
    assert found == [
        ["HfHubHTTPError", 409],
        ["RepositoryNotFoundError", 404],
        ["RepositoryNotFoundError", 404],
        ["RepositoryNotFoundError", 404],
        ["RevisionNotFoundError", 404],
        ["RemoteEntryNotFoundError", 404],
        ["RevisionNotFoundError", 404],
        ["HfHubHTTPError", 409],
        ["RevisionNotFoundError", 404],
        ["BadRequestError", 400],
        ["RevisionNotFoundError", 404],
        ["RevisionNotFoundError", 404],
        ["RepositoryNotFoundError", 404],
        ["BadRequestError", 400],
        ["HfHubHTTPError", 403],
        ["HfHubHTTPError", 412],
        ["ValueError", None],
        ["RemoteEntryNotFoundError", 404],
        ["BadRequestError", 400],
        ["BadRequestError", 400],
        ["RepositoryNotFoundError", 404],
        ["HfHubHTTPError", 409],
        ["HfHubHTTPError", 403],
        ["BadRequestError", 400],
    ]


def test_a_version_never_changes(site, files) -> None:
    one, two = files("one", seed=1), files("two", seed=2)
    found = site.stock(
        f"""
api.create_repo("acme/tone")
api.upload_folder(repo_id="acme/tone", folder_path={str(one)!r})
api.create_tag("acme/tone", tag="1.0.0")
before = api.list_repo_refs("acme/tone").tags[0].target_commit
api.upload_folder(repo_id="acme/tone", folder_path={str(two)!r})
try:
    api.create_tag("acme/tone", tag="1.0.0", exist_ok=False)
except Exception as error:
    refused = str(error)
api.delete_tag("acme/tone", tag="1.0.0")
hidden = [t.name for t in api.list_repo_refs("acme/tone").tags]
try:
    api.create_tag("acme/tone", tag="v1.0", exist_ok=False)
except Exception as error:
    again = str(error)
still = api.model_info("acme/tone", revision="1.0.0").sha
api.create_tag("acme/tone", tag="1.0.0", revision=before)
back = [t.name for t in api.list_repo_refs("acme/tone").tags]
print(json.dumps([before, refused, hidden, again, still, back]))
"""
    )
    before, refused, hidden, again, still, back = found
    assert "published" in refused and "immutable" in refused
    assert hidden == []
    assert "immutable" in again  # yanked, not gone: other bytes are refused for ever
    assert still == before
    assert back == ["1.0.0"]
    assert site.store.catalogue("acme/tone").releases[0].yanked is None


def test_deleting_a_repository(site, files) -> None:
    directory = files("tone")
    found = site.stock(
        f"""
api.create_repo("acme/draft")
api.upload_folder(repo_id="acme/draft", folder_path={str(directory)!r})
api.delete_repo("acme/draft")
api.create_repo("acme/draft")  # it never had a version, so its name is free again
api.create_repo("acme/tone")
api.upload_folder(repo_id="acme/tone", folder_path={str(directory)!r})
api.create_tag("acme/tone", tag="1.0.0")
api.delete_repo("acme/tone")
api.delete_repo("acme/tone", missing_ok=True)
try:
    api.create_repo("acme/tone")
except Exception as error:
    dead = error.response.status_code
print(json.dumps([api.list_repo_files("acme/draft"), api.repo_exists("acme/tone"), dead,
    [m.id for m in api.list_models()]]))
"""
    )
    assert found == [[], False, 410, ["acme/draft"]]
    catalogue = site.store.catalogue("acme/tone")
    assert catalogue.releases == ()
    assert catalogue.tombstones[0].final
    assert "deleted" in (catalogue.tombstones[0].reason or "")
    assert site.store.verify() == []


def test_renaming_a_repository(site, files) -> None:
    """As the stock client does it; what is published keeps its name, since that is in its digest."""
    directory = files("tone")
    found = site.stock(
        f"""
def kind(call):
    try:
        return call()
    except Exception as error:
        return [type(error).__name__, error.response.status_code]
api.create_repo("acme/draft", private=False)
commit = api.upload_folder(repo_id="acme/draft", folder_path={str(directory)!r})
api.create_tag("acme/draft", tag="trial")
api.create_branch("acme/draft", branch="other")
api.create_repo("acme/taken")
taken = kind(lambda: api.move_repo("acme/draft", "acme/taken"))
api.move_repo("acme/draft", "team/Final")
moved = [api.model_info(name).id for name in ("acme/draft", "team/final")]
api.upload_file(path_or_fileobj=b"x\\n", path_in_repo="a.txt", repo_id="acme/draft")  # an old address still leads there
refs = api.list_repo_refs("team/Final")
log = [c.commit_id for c in api.list_repo_commits("team/Final")]
path = snapshot_download("acme/draft", revision=commit.oid)
api.create_repo("acme/draft")
fresh = api.list_repo_files("acme/draft")
api.create_tag("team/Final", tag="1.0.0")
published = kind(lambda: api.move_repo("team/Final", "team/other"))
print(json.dumps(dict(taken=taken, moved=moved, log=log[-1] == commit.oid, fresh=fresh, published=published,
    refs=[[r.name for r in refs.branches], [r.name for r in refs.tags]], models=[m.id for m in api.list_models()])))
"""
    )
    assert found["taken"] == ["HfHubHTTPError", 409]
    assert found["moved"] == ["team/Final", "team/Final"]
    assert found["log"] is True
    assert found["refs"] == [["main", "other"], ["trial"]]
    assert found["fresh"] == []
    assert found["published"] == ["BadRequestError", 400]
    assert found["models"] == ["team/Final", "acme/draft", "acme/taken"]
    assert str(site.store.get("team/final").ref) == "team/Final@1.0.0"


def test_what_others_require_is_not_deleted(site, packed) -> None:
    site.store.put(packed("acme/tone@1.0.0")[0])
    needs = [{"name": "acme/tone", "digest": site.store.get("acme/tone").digest}]
    site.store.put(packed("acme/both@1.0.0", type="composition", kind="", expression="a", requires=needs)[0])
    answer = site.ask("/api/repos/delete", "DELETE", {"name": "tone", "organization": "acme"})
    assert answer.status == 409
    assert "required by acme/both@1.0.0" in answer.json()["error"]
    assert site.ask("/api/repos/delete", "DELETE", {"name": "both", "organization": "acme"}).status == 200
    assert site.ask("/api/repos/delete", "DELETE", {"name": "tone", "organization": "acme"}).status == 200
    assert site.store.names() == []


def test_branches(site, files) -> None:
    one, two = files("one", seed=1), files("two", seed=2)
    found = site.stock(
        f"""
api.create_repo("acme/tone")
api.upload_folder(repo_id="acme/tone", folder_path={str(one)!r})
api.create_tag("acme/tone", tag="1.0.0")
api.create_branch("acme/tone", branch="trial")
api.create_branch("acme/tone", branch="trial", exist_ok=True)
api.upload_folder(repo_id="acme/tone", folder_path={str(two)!r}, revision="trial")
heads = {{b.name: b.target_commit for b in api.list_repo_refs("acme/tone").branches}}
api.create_tag("acme/tone", tag="2.0.0rc1", revision="trial")
main = api.model_info("acme/tone").sha
api.delete_branch("acme/tone", branch="trial")
print(json.dumps([heads, main, [b.name for b in api.list_repo_refs("acme/tone").branches]]))
"""
    )
    heads, main, left = found
    assert set(heads) == {"main", "trial"}
    assert heads["main"] == main != heads["trial"]  # a pre-release does not become the newest version
    assert left == ["main"]
    assert site.store.get("acme/tone@2.0.0rc1").ref.version == "2.0.0rc1"


def test_large_files_go_by_lfs_where_xet_is_off(small_site, files) -> None:
    directory = files("tone")
    weights = directory / "adapter_model.safetensors"
    extra = directory / "aux"
    extra.mkdir()
    (extra / "notes.txt").write_text("law\n" * 2000)  # 8 kB: over what goes inline
    found = small_site.stock(
        f"""
api.create_repo("acme/tone")
commit = api.upload_folder(repo_id="acme/tone", folder_path={str(directory)!r})
again = api.upload_folder(repo_id="acme/tone", folder_path={str(directory)!r})
copied = CommitOperationCopy("adapter_model.safetensors", "aux/copy.safetensors")
copy = api.create_commit("acme/tone", [copied], commit_message="copy")
api.create_tag("acme/tone", tag="1.0.0", revision=commit.oid)
path = snapshot_download("acme/tone", revision="1.0.0")
notes = open(path + "/aux/notes.txt").read()
print(json.dumps([again.oid == commit.oid, notes, api.list_repo_files("acme/tone", revision=copy.oid)]))
""",
        HF_HUB_DISABLE_XET="1",
    )
    assert found[0] is True
    assert found[1] == "law\n" * 2000
    assert "aux/copy.safetensors" in found[2]
    entry = small_site.store.get("acme/tone").manifest.file("adapter_model.safetensors")
    assert entry is not None and entry.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_a_client_with_xet_is_told_what_to_do_for_huge_files(small_site, files) -> None:
    directory = files("tone")
    (directory / "notes.txt").write_text("law\n" * 2000)
    said = small_site.stock(
        f"""
api.create_repo("acme/tone")
api.upload_folder(repo_id="acme/tone", folder_path={str(directory)!r})
""",
        fails=True,
    )
    assert "HF_HUB_DISABLE_XET=1" in said


def test_too_large_is_said_before_it_travels(small_site, tmp_path: Path) -> None:
    (tmp_path / "big.txt").write_text("x" * 70_000)
    said = small_site.stock(
        f"""
api.create_repo("acme/tone")
api.upload_file(path_or_fileobj={str(tmp_path / "big.txt")!r}, path_in_repo="big.txt", repo_id="acme/tone")
""",
        fails=True,
    )
    assert "413" in said and "64000" in said


def test_offline_after_the_first_download(site, files) -> None:
    directory = files("tone")
    script = """
path = snapshot_download("acme/tone", revision="1.0.0")
print(json.dumps(sorted(__import__("os").listdir(path))))
"""
    site.stock(
        f"""
api.create_repo("acme/tone")
api.upload_folder(repo_id="acme/tone", folder_path={str(directory)!r})
api.create_tag("acme/tone", tag="1.0.0")
{script}
"""
    )
    found = site.stock(script, HF_HUB_OFFLINE="1")
    assert found == ["README.md", "adapter_config.json", "adapter_model.safetensors", "module.json"]


def test_download_resumes(site, files) -> None:
    """The client asks for the rest of a file with a Range, which must be answered with exactly that."""
    directory = files("tone")
    data = (directory / "adapter_model.safetensors").read_bytes()
    found = site.stock(
        f"""
import io
from huggingface_hub.file_download import http_get
api.create_repo("acme/tone")
api.upload_folder(repo_id="acme/tone", folder_path={str(directory)!r})
target = io.BytesIO()
target.write({data[:100]!r})
http_get(hf_hub_url("acme/tone", "adapter_model.safetensors"), target, resume_size=100, expected_size={len(data)})
print(json.dumps(target.getvalue().hex()))
"""
    )
    assert bytes.fromhex(found) == data


def test_the_file_system_and_the_command_line_of_the_client(site, files, tmp_path: Path) -> None:
    directory = files("tone")
    found = site.stock(
        f"""
import subprocess
from pathlib import Path
hf = str(Path(sys.executable).with_name("hf"))
def run(*words):
    return subprocess.run([hf, *words], capture_output=True, text=True).returncode
codes = [
    run("repos", "create", "acme/tone"),
    run("upload", "acme/tone", {str(directory)!r}),
    run("repos", "tag", "create", "acme/tone", "1.0.0"),
    run("download", "acme/tone", "--revision", "1.0.0", "--local-dir", {str(tmp_path / "here")!r}),
    run("download", "acme/nope"),
]
fs = HfFileSystem()
print(json.dumps([codes, fs.ls("acme/tone", detail=False), fs.read_text("acme/tone@1.0.0/README.md"),
    fs.glob("acme/tone/*.json"), fs.info("acme/tone/adapter_model.safetensors")["size"], fs.exists("acme/tone/nope")]))
"""
    )
    codes, listed, card, globbed, size, exists = found
    assert codes[:4] == [0, 0, 0, 0] and codes[4] != 0
    assert listed[:2] == ["acme/tone/README.md", "acme/tone/adapter_config.json"]
    assert card == "# tone\n"
    assert globbed == ["acme/tone/adapter_config.json", "acme/tone/module.json"]
    assert size == (directory / "adapter_model.safetensors").stat().st_size
    assert exists is False
    assert (tmp_path / "here" / "README.md").read_text() == "# tone\n"
