from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub.errors import IntegrityError
from hub.storage.ledger import Event, Ledger, Position
from hub.storage.releases import Catalogue

DIGEST = "sha256:" + "1" * 64


def filled(path: Path, count: int = 5) -> Ledger:
    ledger = Ledger(path)
    for i in range(count):
        ledger.append(Event("publish", f"acme/m{i % 2}", DIGEST, version=f"1.{i}"), ledger.end())
    return ledger


def test_reads_what_was_appended(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "log.jsonl")
    events = list(ledger.read())
    assert [event.version for event, _ in events] == [f"1.{i}" for i in range(5)]
    assert events[-1][1] == ledger.end()
    assert ledger.end().offset == ledger.size
    assert [event.version for event in ledger.about("acme/m1")] == ["1.1", "1.3"]


def test_reading_goes_on_from_a_position(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "log.jsonl")
    events = list(ledger.read())
    assert list(ledger.read(events[2][1])) == events[3:]
    assert list(ledger.read(ledger.end())) == []


def test_an_absent_log_is_empty(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "log.jsonl")
    assert ledger.end() == Position()
    assert list(ledger.read()) == list(ledger.about("acme/x")) == []


@pytest.mark.parametrize("cut", [1, 10, 100])
def test_a_torn_last_line_never_happened(tmp_path: Path, cut: int) -> None:
    ledger = filled(tmp_path / "log.jsonl")
    before = list(ledger.read())
    ledger.path.write_bytes(ledger.path.read_bytes()[:-cut])
    assert list(ledger.read()) == before[:-1]
    assert ledger.end() == before[-2][1]
    ledger.append(Event("publish", "acme/new", DIGEST, version="9.0"), ledger.end())
    assert [event.name for event, _ in ledger.read()][-1] == "acme/new"


def test_a_torn_first_line(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "log.jsonl")
    ledger.path.write_bytes(b'{"op": "publ')
    assert ledger.end() == Position()
    ledger.append(Event("publish", "acme/new", DIGEST, version="9.0"), ledger.end())
    assert len(list(ledger.read())) == 1


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: lines[:2] + lines[3:],  # taken out
        lambda lines: [lines[1], lines[0], *lines[2:]],  # exchanged
        lambda lines: [lines[0], lines[1].replace(b"1.1", b"1.7"), *lines[2:]],  # changed
        lambda lines: lines[1:],  # the first taken out
        lambda lines: [*lines, b"not json\n"],
        lambda lines: [*lines, b'{"op": "explode", "name": "acme/x"}\n'],
    ],
)
def test_a_changed_line_breaks_the_chain(tmp_path: Path, edit) -> None:
    ledger = filled(tmp_path / "log.jsonl")
    ledger.path.write_bytes(b"".join(edit(ledger.path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(IntegrityError):
        list(ledger.read())


def test_end_of_a_log_with_long_lines(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "log.jsonl", 2)
    ledger.append(Event("yank", "acme/m1", DIGEST, reason="x" * 200_000), ledger.end())
    assert ledger.end() == list(ledger.read())[-1][1]


steps = st.lists(
    st.one_of(
        st.builds(lambda v: ("publish", v), st.integers(0, 4)),
        st.builds(lambda v, a: ("alias", v, a), st.integers(0, 4), st.sampled_from(["prod", "dev"])),
        st.builds(lambda a: ("untag", a), st.sampled_from(["prod", "dev"])),
        st.builds(lambda v: ("yank", v), st.integers(0, 4)),
        st.builds(lambda v: ("unyank", v), st.integers(0, 4)),
    ),
    max_size=12,
)


@given(steps)
def test_fold_replays_a_plain_model(steps) -> None:
    versions, aliases, yanked, events = {}, {}, {}, []
    for step in steps:
        op, *rest = step
        digest = f"sha256:{rest[0]:064x}" if rest and isinstance(rest[0], int) else None
        if op == "publish" and digest not in versions:
            versions[digest] = f"1.{rest[0]}"
            events.append(Event("publish", "a/b", digest, version=f"1.{rest[0]}"))
        elif op == "alias" and digest in versions:
            aliases[rest[1]] = digest
            events.append(Event("alias", "a/b", digest, alias=rest[1]))
        elif op == "untag" and rest[0] in aliases:
            del aliases[rest[0]]
            events.append(Event("alias", "a/b", None, alias=rest[0]))
        elif op in ("yank", "unyank") and digest in versions:
            yanked[digest] = "bad" if op == "yank" else None
            events.append(Event(op, "a/b", digest, reason=yanked[digest]))
    folded = Catalogue.fold("a/b", events)
    assert {r.digest: r.version for r in folded.releases} == versions
    assert [r.version for r in folded.releases] == sorted(versions.values())
    assert folded.aliases == aliases
    assert {r.digest: r.yanked for r in folded.releases if r.yanked} == {d: y for d, y in yanked.items() if y}
