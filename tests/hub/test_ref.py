import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from hub.errors import RefError
from hub.ref import AdapterRef, version_key

names = st.from_regex(r"[A-Za-z0-9](?:[A-Za-z0-9]|[._-](?=[A-Za-z0-9])){0,20}", fullmatch=True)
numbers = st.integers(0, 10**6)
versions = st.builds(
    lambda release, pre, post, dev: ".".join(map(str, release)) + pre + post + dev,
    st.lists(numbers, min_size=1, max_size=4),
    st.one_of(st.just(""), st.builds("{}{}".format, st.sampled_from(["a", "b", "rc", "-alpha.", "c"]), numbers)),
    st.one_of(st.just(""), st.builds(".post{}".format, numbers)),
    st.one_of(st.just(""), st.builds(".dev{}".format, numbers)),
)
aliases = st.from_regex(r"[a-z](?:[a-z]|[._-](?=[a-z])){0,20}", fullmatch=True)
digests = st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True)
clauses = st.builds("{}{}".format, st.sampled_from([">=", "<=", ">", "<", "==", "!=", "~= 0."]), versions)
ranges = st.lists(clauses, min_size=1, max_size=3).map(", ".join)
pins = st.one_of(
    st.just(""),
    st.builds("@{}".format, versions),
    st.builds("@{}".format, aliases),
    st.builds("@{}".format, digests),
    ranges,
)
texts = st.builds(
    lambda namespace, name, pin: namespace + name + pin, st.one_of(st.just(""), names.map("{}/".format)), names, pins
)


def parsed_or_refused(text: str) -> AdapterRef | None:
    try:
        return AdapterRef.parse(text)
    except RefError as error:
        assert error.exit_code == 2
        return None


@given(texts)
def test_round_trip(text: str) -> None:
    ref = parsed_or_refused(text)
    if ref is None:  # a name such as "a--b", or a version range that PEP 440 refuses
        return
    assert AdapterRef.parse(str(ref)) == ref
    assert str(AdapterRef.parse(str(ref))) == str(ref)
    assert hash(AdapterRef.parse(str(ref))) == hash(ref)


@given(st.text(max_size=60))
def test_any_text_is_a_ref_or_a_ref_error(text: str) -> None:
    ref = parsed_or_refused(text)
    assert ref is None or AdapterRef.parse(str(ref)) == ref


@given(versions, versions)
def test_version_key_orders_as_pep_440(a: str, b: str) -> None:
    left, right = Version(a), Version(b)
    assert (version_key(a) < version_key(b)) == (left < right)
    assert (version_key(a) == version_key(b)) == (left == right)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("tone", "local/tone"),
        ("acme/tone@1.2.0", "acme/tone@1.2.0"),
        ("acme/tone@v1.2.0-rc.1", "acme/tone@1.2.0rc1"),
        ("acme/tone@prod", "acme/tone@prod"),
        ("acme/tone < 2, >= 1.0", "acme/tone>=1.0,<2"),
        ("acme/tone==1.*", "acme/tone==1.*"),
        ("tone@sha256:" + "0" * 64, "local/tone@sha256:" + "0" * 64),
    ],
)
def test_canonical_text(text: str, canonical: str) -> None:
    assert str(AdapterRef.parse(text)) == canonical


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "a/b/c",
        "../etc",
        "acme/..",
        "a..b",
        "acme/tone.git",
        "acme.git/tone",
        "acme/Tone.Git",
        "api/tone",
        "Static/tone",
        "lfs/tone",
        "datasets/tone",
        "acme/resolve",
        "acme/tone@",
        "acme/tone@1.0@2.0",
        "acme/tone@1.0+cpu",
        "acme/tone@1!2.0",
        "acme/tone@sha256:abc",
        "acme/tone@sha256:" + "A" * 64,
        "acme/tone===1.0",
        "acme/tone>=",
        "acme/tone>=1,,<2x",
        "-tone",
        "tone-",
        "a" * 97,
        "a\x00b",
        "acme/tone@" + "9" * 65,
        "x" * 600,
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(RefError):
        AdapterRef.parse(text)


def test_a_bad_name_gets_a_suggestion() -> None:
    for text, hint in (("My--Tone_", "try 'My-Tone'"), ("acme/tone.git", "try 'tone'"), ("lfs/a", "try 'lfs-team'")):
        with pytest.raises(RefError) as caught:
            AdapterRef.parse(text)
        assert caught.value.hint == hint


def test_names_are_shown_as_written_and_compared_without_case() -> None:
    written, other = AdapterRef.parse("Acme/Tone@1.0"), AdapterRef.parse("acme/tone@v1.0")
    assert str(written) == "Acme/Tone@1.0"
    assert written == other
    assert (
        len({written, other, AdapterRef.parse("acme/tone@1.1"), AdapterRef.parse("acme/Tone@sha256:" + "0" * 64)}) == 3
    )
    assert written != "Acme/Tone@1.0"


def test_one_pin_only() -> None:
    with pytest.raises(RefError):
        AdapterRef("acme", "tone", version="1.0", alias="prod")


def test_at_replaces_the_pin() -> None:
    ref = AdapterRef.parse("acme/tone>=1")
    assert str(ref.at(version="2.0")) == "acme/tone@2.0"
    assert str(ref.at()) == ref.id == "acme/tone"
