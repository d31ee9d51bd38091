import pytest

from hub.errors import NotFound
from hub.ref import AdapterRef
from hub.storage.releases import Catalogue, Release, choose


def digest(i: int) -> str:
    return f"sha256:{i:064x}"


CATALOGUE = Catalogue(
    "acme/tone",
    tuple(
        Release(version, digest(i), yanked)
        for i, (version, yanked) in enumerate(
            [
                ("1.0", None),
                ("1.1", None),
                ("1.2", "leaks"),
                ("2.0a1", None),
                ("2.0", None),
                ("2.1", "wrong"),
                ("3.0rc1", None),
            ]
        )
    ),
    {"prod": digest(1), "bad": digest(2)},
)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("acme/tone", "2.0"),  # the highest final version that is not yanked
        ("acme/tone@latest", "2.0"),
        ("acme/tone<2", "1.1"),
        ("acme/tone>=1,<1.1", "1.0"),
        ("acme/tone~=1.0", "1.1"),
        ("acme/tone==1.*", "1.1"),
        ("acme/tone>2.0,!=2.1", "3.0rc1"),  # only a pre-release fits
        ("acme/tone>=3.0rc1", "3.0rc1"),  # the range names a pre-release
        ("acme/tone!=2.0,<3", "1.1"),
        ("acme/tone@1.2", "1.2"),  # yanked, but pinned exactly
        ("acme/tone@1.2.0", "1.2"),  # the same version, written longer
        ("acme/tone@bad", "1.2"),
        ("acme/tone@prod", "1.1"),
        (f"acme/tone@{digest(5)}", "2.1"),
    ],
)
def test_choice(text: str, version: str) -> None:
    assert choose(AdapterRef.parse(text), CATALOGUE).version == version


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("acme/tone@9.9", "acme/tone@9.9 is not in", "there are 1.0, 1.1"),
        ("acme/tone@prd", "no alias 'prd'", "did you mean prod?"),
        ("acme/tone@canary", "no alias 'canary'", "@prod"),
        ("acme/tone>=7", "fits >=7", "there are"),
        ("acme/tone>1.1,<2.0a0", "yanked", "acme/tone@1.2"),
        ("acme/tone@sha256:" + "f" * 64, "is not in", "there are"),
    ],
)
def test_not_found_says_what_there_is(text: str, message: str, hint: str) -> None:
    with pytest.raises(NotFound) as caught:
        choose(AdapterRef.parse(text), CATALOGUE)
    assert message in str(caught.value)
    assert hint in caught.value.hint


def test_nothing_published() -> None:
    with pytest.raises(NotFound):
        choose(AdapterRef.parse("acme/tone"), Catalogue("acme/tone"))


def test_only_prereleases() -> None:
    catalogue = Catalogue("a/b", (Release("1.0a1", digest(1)), Release("1.0rc1", digest(2))))
    assert choose(AdapterRef.parse("a/b"), catalogue).version == "1.0rc1"
