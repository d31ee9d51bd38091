"""Domains: the built-in ones, the user's own, the split, and what is refused."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from hub.errors import UsageError
from train.quickstart import builtin, corpus, userfiles
from train.quickstart.corpus import Document, GatheredTexts, split
from train.quickstart.neardup import THRESHOLD, overlap, shingles


def prose(seed: int, words: int = 150) -> str:
    return " ".join(f"w{random.Random(seed * 1000 + i).randrange(5000)}" for i in range(words))


def gathered(name: str, count: int, offset: int) -> GatheredTexts:
    return GatheredTexts(tuple(Document(f"{name}{i}", prose(offset + i)) for i in range(count)))


@pytest.fixture
def two():
    return {"a": gathered("a", 20, 0), "b": gathered("b", 20, 100)}


@pytest.fixture(scope="module")
def this_machine():
    return split(builtin.builtin(0), seed=0)


# -- the text of this machine ----------------------------------------------------------------------------------------


def test_every_python_machine_has_four_domains(this_machine):
    assert [d.name for d in this_machine] == ["code", "docs", "licences", "readmes"]
    for domain in this_machine:
        assert domain.heldout
        assert sum(len(d.text) for d in domain.train) >= corpus.TRAIN_LEAST
        assert all(corpus.SHORTEST <= len(d.text) <= corpus.DOCUMENT_CHARS for d in domain.train + domain.heldout)
    text = {d.name: "\n".join(x.text for x in d.train) for d in this_machine}
    assert "def " in text["code"]
    assert "import" in text["docs"]
    assert "copyright" in text["licences"].lower()
    assert "pip install" in text["readmes"]


def test_no_near_duplicate_straddles_the_split(this_machine):
    sides = [
        (d.name, side, shingles(x.text))
        for d in this_machine
        for side in ("train", "heldout")
        for x in getattr(d, side)
    ]
    held = [s for _, side, s in sides if side == "heldout"]
    assert max(overlap(a, b) for a in held for _, side, b in sides if side == "train") < THRESHOLD


def test_the_project_itself_is_no_package_of_the_corpus():
    assert "moduloom" not in dict(builtin._distributions())


def test_a_bundle_of_licences_yields_its_parts():
    bundle = ("\n" + "-" * 40 + "\n").join(prose(i) for i in range(3))
    assert [d.name for d in builtin._parts("x", bundle)] == ["x [1]", "x [2]", "x [3]"]
    assert [d.name for d in builtin._parts("x", prose(1))] == ["x"]


def test_works_with_the_runtime_dependencies_alone(monkeypatch):
    """A bare environment has about fifty packages: the project's own dependencies and theirs."""
    needed = {"pip", "torch", "numpy", "transformers", "rich", "click", "pydantic", "matplotlib", "networkx", "pillow"}
    needed |= {"tqdm", "regex", "huggingface-hub", "accelerate", "safetensors", "packaging", "jinja2", "sympy"}
    found = [x for x in builtin._distributions() if x[0] in needed]
    monkeypatch.setattr(builtin, "_distributions", lambda: found)
    domains = split(builtin.builtin(0), seed=0)
    assert all(len(d.heldout) >= 2 for d in domains)


# -- the split -------------------------------------------------------------------------------------------------------


def test_the_split_is_decided_by_the_seed_alone(two):
    first = split(two, seed=1)
    shuffled = {n: GatheredTexts(tuple(random.Random(5).sample(g.documents, 20))) for n, g in two.items()}
    assert [d.digest for d in split(two, seed=1)] == [d.digest for d in first]
    assert [d.digest for d in split(shuffled, seed=1)] == [d.digest for d in first]
    assert [d.digest for d in split(two, seed=2)] != [d.digest for d in first]


def test_another_process_gives_the_same_digests(two, tmp_path):
    """String hashing differs between processes; the split must not."""
    for name, found in two.items():
        (tmp_path / name).mkdir()
        for document in found.documents:
            (tmp_path / name / f"{document.name}.txt").write_text(document.text)
    program = (
        "import sys; from pathlib import Path; from train.quickstart import userfiles; "
        "from train.quickstart.corpus import split; root = Path(sys.argv[1]); "
        "print([d.digest for d in split({n: userfiles.read_domain(n, root / n, 3) for n in 'ab'}, seed=3)])"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    }
    here = split({n: userfiles.read_domain(n, tmp_path / n, 3) for n in "ab"}, seed=3)
    assert runs == {f"{[d.digest for d in here]}\n"}


def test_held_out_by_document_a_fifth_and_at_most_eight(two):
    for domain in split(two, seed=0):
        assert len(domain.heldout) == 4
        assert len(domain.train) == 16
        assert not {d.name for d in domain.train} & {d.name for d in domain.heldout}
    many = {"a": gathered("a", 100, 0), "b": gathered("b", 100, 500)}
    assert [len(d.heldout) for d in split(many, seed=0)] == [corpus.HELDOUT_MOST] * 2


def test_near_duplicates_leave_and_are_counted(two):
    copies = tuple(Document(f"copy{i}", f"header {i} of {i}\n" + two["a"].documents[0].text) for i in range(5))
    domain = split({**two, "a": GatheredTexts(two["a"].documents + copies)}, seed=0)[0]
    assert len(domain.train) + len(domain.heldout) == 20
    assert domain.left_out == ("5 near-duplicates",)


def test_fewer_than_two_domains(two):
    with pytest.raises(UsageError, match="at least two domains, got 1"):
        split({"a": two["a"]}, seed=0)


def test_too_little_text_after_near_duplicates(two):
    same = GatheredTexts(tuple(Document(f"a{i}", two["a"].documents[0].text + f" {i}") for i in range(50)))
    with pytest.raises(UsageError, match="domain 'a' has too little text: 1 distinct document "):
        split({"a": same, "b": two["b"]}, seed=0)


def test_sizes_are_capped():
    huge = [Document(f"d{i}", f"{i} " * 10_000) for i in range(60)]
    found = corpus.within_limits("x", huge, 0)
    assert all(len(d.text) <= corpus.DOCUMENT_CHARS for d in found.documents)
    assert sum(len(d.text) for d in found.documents) <= corpus.DOMAIN_CHARS + corpus.DOCUMENT_CHARS


# -- the user's files ------------------------------------------------------------------------------------------------


def test_a_folder_of_files_is_one_document_a_file(tmp_path):
    (tmp_path / "sub").mkdir()
    for i in range(12):
        (tmp_path / ("sub" if i % 2 else ".") / f"{i}.md").write_text(prose(i))
    (tmp_path / ".hidden").write_text(prose(99))
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    (tmp_path / "short.txt").write_text("too short")
    found = userfiles.read_domain("x", tmp_path, 0)
    assert sorted(d.name for d in found.documents) == sorted(f"{'sub/' if i % 2 else ''}{i}.md" for i in range(12))
    assert len(found.left_out) == 2
    assert "image.png is not UTF-8 text" in found.left_out[0]
    assert found.left_out[1] == "1 document under 300 characters"


def test_one_long_file_becomes_passages(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(prose(i, 80) for i in range(100)))
    found = userfiles.read_domain("x", path, 0)
    assert len(found.documents) > 8
    assert all(len(d.text) <= userfiles.PASSAGE_CHARS for d in found.documents)
    words = sum(len(d.text.split()) for d in found.documents)
    assert words == 8000


def test_a_line_of_a_jsonl_file_is_a_document(tmp_path):
    path = tmp_path / "mail.jsonl"
    path.write_text("\n".join(json.dumps({"text": prose(i), "id": i}) for i in range(10)) + "\n\n")
    found = userfiles.read_domain("x", path, 0)
    assert sorted(d.name for d in found.documents) == sorted(f"mail.jsonl:{i}" for i in range(1, 11))


def test_gigabytes_are_sampled_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(userfiles, "DOMAIN_CHARS", 2000)
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(prose(i))
    read = []
    plain = userfiles._read_file
    monkeypatch.setattr(userfiles, "_read_file", lambda *a: read.append(a) or plain(*a))
    userfiles.read_domain("x", tmp_path, 0)
    assert len(read) < 15


def test_utf8_with_a_mark_and_a_character_cut_by_the_limit(tmp_path):
    path = tmp_path / "u.txt"
    path.write_bytes(b"\xef\xbb\xbf" + ("äöü " * 2000).encode())
    assert userfiles.read_domain("x", path, 0).documents[0].text.startswith("ä")
    documents = list(userfiles._read_file("x", tmp_path, path, 1001))
    assert len(documents[0].text) == 1001


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.write_text(""), "holds no text"),
        (lambda p: p.write_text(" \n\n "), "holds no text"),
        (lambda p: p.mkdir(), "holds no text"),
        (lambda p: p.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(range(256))), "is not UTF-8 text|is a binary file"),
        (lambda p: p.write_bytes(b"text \x00 more"), "is a binary file"),
        (lambda p: os.mkfifo(p), "is not a regular file"),
    ],
)
def test_bad_files_are_named(tmp_path, make, message):
    path = tmp_path / "bad"
    make(path)
    with pytest.raises(UsageError, match=message) as caught:
        userfiles.read_domain("law", path, 0)
    assert "law" in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("line", "message"),
    [("{not json", "line 2 is not JSON"), ('{"body": "x"}', 'line 2 has no "text"'), ("[1]", 'line 2 has no "text"')],
)
def test_bad_json_lines_are_named(tmp_path, line, message):
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join([json.dumps({"text": prose(1)}), line, json.dumps({"text": prose(2)})]))
    with pytest.raises(UsageError, match=message):
        userfiles.read_domain("x", path, 0)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_named(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text(prose(1))
    path.chmod(0)
    with pytest.raises(UsageError, match="cannot read"):
        userfiles.read_domain("x", path, 0)


# -- --domain NAME=PATH ----------------------------------------------------------------------------------------------


def test_domains_of_the_command_line():
    assert userfiles.parse_domains(["law=texts/law", "mail=a=b.txt"]) == {
        "law": Path("texts/law"),
        "mail": Path("a=b.txt"),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["law"], "is not NAME=PATH"),
        (["law=", "a=b"], "is not NAME=PATH"),
        (["Law=a", "b=c"], "cannot name an adapter"),
        (["2024=a", "b=c"], "cannot name an adapter"),
        (["a-=a", "b=c"], "cannot name an adapter"),
        (["../x=a", "b=c"], "cannot name an adapter"),
        (["a..b=a", "b=c"], "cannot name an adapter"),
        (["a=x", "a=y"], "given twice"),
        (["a=x"], "at least two domains, got 1"),
    ],
)
def test_bad_domain_options(options, message):
    with pytest.raises(UsageError, match=message):
        userfiles.parse_domains(options)
