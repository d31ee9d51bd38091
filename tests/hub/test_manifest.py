import json
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub.contents.manifest_outline import outline
from hub.errors import ManifestError
from hub.io import canonical_json as canonical
from hub.manifest import BaseIdentity, Draft, FileEntry, Lineage, Manifest, Metric, Requirement, TensorEntry, TrainedOn

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**53) + 1, 2**53 - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        words,
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=8,
)
hexes = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
metrics = st.builds(
    Metric,
    dataset=words,
    metric=words,
    value=st.floats(allow_nan=False, allow_infinity=False),
    sd=st.none() | st.floats(0, 1),
    seeds=st.lists(st.integers(0, 99), max_size=3).map(tuple),
)
manifests = st.builds(
    Manifest,
    name=st.just("acme/tone"),
    version=st.sampled_from(["1.0", "2.0rc1", "0.1.dev3"]),
    kind=st.just("lora"),
    hyperparameters=st.dictionaries(words, json_values, max_size=4),
    labels=st.lists(words, max_size=3).map(tuple),
    metrics=st.lists(metrics, max_size=2).map(tuple),
    requires=st.lists(
        st.builds(Requirement, name=st.just("acme/b"), range=st.sampled_from([None, "<2,>=1"])), max_size=2
    ),
    trained_on=st.none() | st.builds(TrainedOn, quantization=st.just("nf4"), double_quant=st.booleans()),
    summary=st.text(st.characters(exclude_categories=["Cs"]), max_size=50),
    files=st.builds(lambda h: (FileEntry(path="a.json", sha256=h, size=3),), hexes),
    tensors=st.builds(lambda h: (TensorEntry(name="w", dtype="F32", shape=(2, 3), sha256=h),), hexes),
    tensors_digest=hexes.map("sha256:{}".format),
    created=st.datetimes(timezones=st.just(timezone(timedelta(hours=2))), min_value=datetime(1990, 1, 1)),
)


@given(manifests)
def test_canonical_form_is_a_fixed_point(manifest: Manifest) -> None:
    again = Manifest.parse(manifest.canonical)
    assert again == manifest
    assert again.canonical == manifest.canonical
    assert again.digest == manifest.digest == canonical.digest(manifest.canonical)
    assert Manifest.parse(json.dumps(json.loads(manifest.canonical), indent=3).encode()).digest == manifest.digest


@given(manifests, st.sampled_from(["name", "version", "summary", "kind", "tensors_digest"]))
def test_digest_tells_manifests_apart(manifest: Manifest, field: str) -> None:
    changed = {
        "name": "acme/other",
        "version": "9.9",
        "summary": manifest.summary + "!",
        "kind": "ia3",
        "tensors_digest": "sha256:" + "0" * 64,
    }[field]
    assert manifest.model_copy(update={field: changed}).model_dump() != manifest.model_dump()
    other = Manifest.model_validate({**manifest.model_dump(), field: changed})
    assert other.digest != manifest.digest


def test_a_field_at_its_default_is_not_in_the_canonical_form(packed) -> None:
    _, manifest = packed()
    document = json.loads(manifest.canonical)
    assert "labels" not in document
    assert "lineage" not in document
    assert {"schema_version", "type"} <= document.keys()
    assert "created" not in document


def test_frozen(packed) -> None:
    _, manifest = packed()
    with pytest.raises(ValueError, match="frozen"):
        manifest.version = "2.0"


@pytest.mark.parametrize(
    ("edit", "place"),
    [
        (lambda m: m.pop("tensors_digest"), "tensors_digest: Field required"),
        (lambda m: m["files"][1].update(sha256="zz"), "files[1].sha256"),
        (lambda m: m["files"][0].update(path="../../etc/passwd"), "files[0].path"),
        (lambda m: m["files"][0].update(path="/etc/passwd"), "files[0].path"),
        (lambda m: m["files"][0].update(path="a\\b"), "files[0].path"),
        (lambda m: m["files"][0].update(size=-1), "files[0].size"),
        (lambda m: m["files"][0].update(size=2**41), "files[0].size"),
        (lambda m: m["files"].reverse(), "files are not sorted"),
        (lambda m: m["files"].append(m["files"][-1]), "a file is listed twice"),
        (lambda m: m["tensors"].append(m["tensors"][0]), "a tensor is listed twice"),
        (lambda m: m["tensors"][0].update(shape=[-1]), "tensors[0].shape[0]"),
        (lambda m: m.update(name="../x"), "name:"),
        (lambda m: m.update(name="acme/tone@1.0"), "name:"),
        (lambda m: m.update(version="not a version"), "version:"),
        (lambda m: m.update(kind=""), "an adapter needs a kind"),
        (lambda m: m.update(type="composition"), "a composition needs an expression"),
        (lambda m: m.update(type="virus"), "type:"),
        (lambda m: m.update(metrics=[{"dataset": "d", "metric": "m", "value": "high"}]), "metrics[0].value"),
        (lambda m: m.update(requires=[{"name": "acme/b", "range": "banana"}]), "requires[0].range"),
        (lambda m: m.update(lineage={"parents": ["not a ref!"]}), "lineage.parents[0]"),
        (lambda m: m.update(schema_version=99), "schema_version 99"),
        (lambda m: m.update(hyperparameters={"n": 2**60 + 1}), "no double holds"),
    ],
)
def test_malformed_manifests_show_where(packed, edit, place: str) -> None:
    document = json.loads(packed()[1].canonical)
    edit(document)
    with pytest.raises(ManifestError) as caught:
        Manifest.parse(json.dumps(document).encode())
    assert place in str(caught.value)


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b"", "line 1, column 1"),
        (b'{"a": 1,\n "b" 2}', "line 2, column 6"),
        (b'{"name": "a", "name": "b"}', "'name' stands twice"),
        (b'{"value": NaN}', "NaN"),
        (b"[1, 2]", "not a JSON object"),
        (b'"\xff"', "not UTF-8: byte 1"),
        (b"[" * 200_000, "not acceptable JSON"),
        (b"1" * 10_000, "not acceptable JSON"),
        (b'{"name": "\\ud800"}', ""),
        (b" " * (canonical.MAX_JSON + 1), "at most"),
    ],
)
def test_broken_json_shows_where(data: bytes, place: str) -> None:
    with pytest.raises(ManifestError) as caught:
        Manifest.parse(data)
    assert place in str(caught.value)


def test_unknown_field_gets_did_you_mean(packed) -> None:
    document = json.loads(packed()[1].canonical)
    document["licence"] = "MIT"
    with pytest.raises(ManifestError) as caught:
        Manifest.parse(json.dumps(document).encode())
    assert "licence" in str(caught.value)
    assert caught.value.hint == "did you mean license?"


def test_base_fingerprint_is_checked(base_identity: BaseIdentity) -> None:
    fields = base_identity.model_dump()
    fields["weights"]["model.norm.weight"] = "f" * 16
    with pytest.raises(ValueError, match="weights_fingerprint"):
        BaseIdentity.model_validate(fields)


def test_draft_is_the_authors_part(packed, base_identity: BaseIdentity) -> None:
    draft = Draft(
        name="tone",
        version="1.0",
        kind="lora",
        base=base_identity,
        lineage=Lineage(parents=("acme/a@1.0",), data={"train": "sha256:" + "1" * 64}),
    )
    directory, _ = packed("local/tone@1.0")
    from hub.pack import pack

    assert pack(directory, draft).draft() == draft
    assert str(draft.ref) == "local/tone@1.0"


@given(manifests)
def test_outline_is_the_manifest_without_tensors(manifest: Manifest) -> None:
    document = json.loads(manifest.canonical)
    document.pop("tensors", None)
    assert outline(manifest.canonical) == document


@pytest.mark.parametrize(
    "hyperparameters",
    [
        {"a": 0, "tensors": [1, 2]},
        {"a": 0, "tensors": [1], "tensors_digest": "x"},
        {"a": 0, "tensors": [{"tensors": []}], "tensors_digest": [{"a": 1, "tensors": [], "tensors_digest": 2}]},
        {"a": '","tensors":[', "z": '],"tensors_digest":'},
    ],
)
@pytest.mark.parametrize("tensors", [True, False])
def test_outline_is_not_fooled(packed, hyperparameters: dict, tensors: bool) -> None:
    manifest = packed("acme/tone@1.0")[1].replace(hyperparameters=hyperparameters)
    manifest = manifest if tensors else manifest.replace(tensors=())
    found = outline(manifest.canonical)
    assert "tensors" not in found
    for field in ("name", "version", "files", "tensors_digest", "kind", "type"):
        assert found[field] == json.loads(manifest.canonical)[field]
