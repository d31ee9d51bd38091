"""`hub run`: order, errors by line, and the same bytes after any number of interruptions."""

from __future__ import annotations

import io
import json
import os
import signal
import time

import pytest
from click.testing import CliRunner

from hub.cli import main
from hub.contents.rows import MAX_LINE, JsonLines, RowError
from hub.errors import Conflict
from router.engine.engine import Engine
from router.running.job import Stream, go
from router.running.journal import Journal
from router.running.rows import Options

BASE = "builtin:tiny-lm"
STOP = ("--on-error", "stop")
OPTIONS = Options(adapter_column="adapter", max_new_tokens=5, scores=2, on_error="stop")


def computed(engine, path, options=OPTIONS) -> bytes:
    out = io.BytesIO()
    with path.open("rb") as stream:
        go(engine, JsonLines(stream, path.name), options, Stream(out))
    return out.getvalue()


@pytest.fixture
def hub(published, monkeypatch):
    monkeypatch.setenv("HUB_HOME", str(published.store.root))

    def call(*args, code=0, **options):
        found = CliRunner().invoke(main, ["run", *map(str, args)], **options)
        assert found.exit_code == code, found.output
        return found

    return call


def test_rows_come_out_in_order_with_their_columns(hub, jsonl, tmp_path, engine):
    path = jsonl(count=30)
    same = (
        path,
        "--base",
        BASE,
        "--adapter-column",
        "adapter",
        "--scores",
        2,
        "--max-new-tokens",
        5,
        "--batch-size",
        8,
    )
    found = hub(*same)
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert [row["id"] for row in rows] == list(range(30))
    assert "30 rows in" in found.stderr
    assert set(rows[4]) == {"id", "text", "adapter", "output", "output_scores"}
    assert rows[4]["output"] in {"bad", "good"}
    assert sum(rows[4]["output_scores"].values()) == pytest.approx(1, abs=1e-3)
    assert rows[1]["output_finish"] in {"length", "stop"}
    assert found.stdout.encode() == computed(engine, path)
    again = hub(*same, "--out", tmp_path / "o")
    assert again.stdout == ""
    assert (tmp_path / "o").read_text() == found.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o", "rows.jsonl"]


def test_the_expression_says_the_base_and_stdin_is_read(hub, jsonl):
    text = jsonl(count=4).read_text()
    found = hub("-", "--expr", "local/mood", input=text)
    assert {json.loads(line)["output"] for line in found.stdout.splitlines()} <= {"bad", "good"}


def test_directories_stand_in_the_expression_for_all_rows_and_in_no_row(hub, published, jsonl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    published.store.get("law").materialize(tmp_path / "mine")
    path = jsonl(count=3)
    for mine, stored in (('"./mine"', "law"), ('0.5 * "./mine" + code', "0.5 * law + code")):
        out = hub(path, "--expr", mine, "--max-new-tokens", 5).stdout
        assert out == hub(path, "--expr", stored, "--max-new-tokens", 5).stdout
    assert "there is no directory ./other" in hub(path, "--expr", '"./other"', code=1).stderr
    rows = tmp_path / "named.jsonl"
    rows.write_text(json.dumps({"text": "To be", "adapter": '"./mine"'}) + "\n")
    assert "line 1: '.' is not a namespace" in hub(rows, "--base", BASE, "--adapter-column", "adapter", code=1).stderr


def test_a_directory_that_changed_is_refused_when_a_run_goes_on(hub, published, jsonl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("router.running.job.WINDOW", 1)
    published.store.get("law").materialize(tmp_path / "mine")
    lines = jsonl(count=8).read_text()
    asked = ("-", "--expr", '0.5 * "./mine"', "--max-new-tokens", 2, "--batch-size", 4, "--out", "out.jsonl", *STOP)
    hub(*asked, code=1, input=lines + "{oops\n")
    weights = tmp_path / "mine" / "adapter_model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    told = hub(*asked, code=2, input=lines).stderr
    assert "was begun with other settings: the content of ./mine 'sha256:" in told
    weights.write_bytes(before)
    (tmp_path / "mine" / "README.md").write_text("what nobody computes with")
    assert "going on after row 8" in hub(*asked, input=lines).stderr


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json\n", "line 3 is not JSON"),
        ("\n", "line 3 is empty"),
        ("[1]\n", "line 3 holds a JSON array"),
        ('{"text": 5, "adapter": "law"}\n', "line 3: 'text' is 5, not a text"),
        ('{"txt": "a", "adapter": "law"}\n', "line 3 has no column 'text'; it has: txt, adapter"),
        ('{"text": "a"}\n', "line 3 has no column 'adapter'"),
        ('{"text": "a", "adapter": "lwa"}\n', "line 3"),
        ('{"text": "", "adapter": "law"}\n', "line 3: 'text' is empty"),
        ('{"text": "\\ud800", "adapter": "law"}\n', "lone surrogate"),
        ('{"text": NaN, "adapter": "law"}\n', "NaN is no number"),
        ('{"text": "a", "adapter": "law", "output": 1}\n', "has a column 'output' already"),
        ('{"text": "' + "word " * 999 + '", "adapter": "law"}\n', "more than the 512"),
    ],
)
def test_a_bad_line_is_named_and_can_be_skipped(engine, jsonl, line, words):
    good = {"text": "To be", "adapter": "law"}
    path = jsonl([good, good, line, good])
    with pytest.raises(RowError, match="line 3") as told:
        computed(engine, path)
    assert words in told.value.message
    assert line[12:15] != "lwa" or "law" in str(told.value.hint)
    rows = [
        json.loads(row) for row in computed(engine, path, Options(**{**vars(OPTIONS), "on_error": "skip"})).splitlines()
    ]
    assert len(rows) == 4
    assert rows[2]["output"] is None
    assert words in rows[2]["output_error"]
    assert rows[0]["output"] == rows[1]["output"] == rows[3]["output"] is not None


def test_lines_of_any_size_are_read_in_bounded_memory():
    text = b"x" * (MAX_LINE + 5) + b"\n" + b'{"a": 1}\r\n' + b'\xff\n{"b": 2}'
    huge, good, binary, last = JsonLines(io.BytesIO(text), "f")
    assert "longer than 16 MiB" in huge.error.message
    assert (good.number, good.row) == (2, {"a": 1})
    assert "not UTF-8" in binary.error.message
    assert (last.number, last.row) == (4, {"b": 2})


def test_usage_is_checked_before_anything_is_loaded(hub, jsonl, tmp_path):
    path = jsonl(count=2)
    assert "nothing says what to run" in hub(path, code=2).stderr
    assert "both say what is applied" in hub(path, "--expr", "a", "--router", "b", code=2).stderr
    assert "need a base" in hub(path, "--adapter-column", "adapter", code=2).stderr
    (tmp_path / "there").write_text("mine\n")
    told = hub(path, "--base", BASE, "--out", tmp_path / "there", code=2).stderr
    assert "is there already" in told
    assert (tmp_path / "there").read_text() == "mine\n"
    before = path.read_bytes()
    assert "is the input" in hub(path, "--base", BASE, "--out", path, "--overwrite", code=2).stderr
    assert path.read_bytes() == before
    told = hub(path, "--router", "local/law", code=2).stderr
    assert "is no router but of type adapter" in told
    assert "--expr local/law" in told


def test_killed_twenty_times_and_still_the_same_bytes(published, jsonl, tmp_path):
    path, out = jsonl(count=320), tmp_path / "out.jsonl"
    engine = Engine(BASE, store=published.store, dtype="fp32", rows=4)
    resumed = 0
    for kill in range(21):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                resume(engine, path, out)
                code = 0
            finally:
                os._exit(code)
        if kill == 20:
            assert os.waitpid(child, 0)[1] == 0
            break
        seen = size(out)
        wait_until(lambda seen=seen: size(out) != seen)
        time.sleep(0.003 * (kill % 5))
        resumed += out.with_name("out.jsonl.journal").exists()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert resumed == 20
    assert out.read_bytes() == computed(engine, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]


def resume(engine, path, out):
    with path.open("rb") as stream:
        lines, journal = JsonLines(stream, path.name), Journal(out, {"rows": engine.rows})
        assert lines.skip(journal.mark.offset, count=journal.mark.rows, number=journal.mark.lines)
        assert not journal.mark.offset or lines.sha256 == journal.mark.sha256
        go(engine, lines, OPTIONS, journal)
        journal.finish()


def size(out) -> int:
    """Bytes of the output and its journal: they grow with every batch."""
    return sum(p.stat().st_size for p in (out, out.with_name(out.name + ".journal")) if p.exists())


def wait_until(true, seconds=120.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_journal_refuses_other_settings_and_other_input(hub, jsonl, tmp_path, monkeypatch):
    path, out = jsonl(count=12), tmp_path / "out.jsonl"
    command = (path, "--base", BASE, "--adapter-column", "adapter", "--out", out, "--max-new-tokens", 3)
    broken = jsonl([*path.read_text().splitlines(keepends=True), "{oops\n"], name="broken.jsonl")

    monkeypatch.setattr("router.running.job.WINDOW", 1)
    stdin = ("-", *command[1:], "--batch-size", 4, "--on-error", "stop")
    assert "line 13 is not JSON" in hub(*stdin, code=1, input=broken.read_text()).stderr
    assert len(out.read_text().splitlines()) == 12  # windows before the bad line are there
    told = hub(*stdin, "--max-new-tokens", 4, code=2, input=path.read_text()).stderr
    assert "max_new_tokens 3, now 4" in told
    assert "is not the input" in hub(*stdin, code=2, input=path.read_text().replace("def", "fed")).stderr
    assert "going on after row 12" in hub(*stdin, input=path.read_text()).stderr
    whole = out.read_text()
    assert whole == hub("-", *command[1:-4], "--max-new-tokens", 3, "--batch-size", 4, input=path.read_text()).stdout
    hub(*stdin, "--overwrite", input=path.read_text())
    assert out.read_text() == whole


def test_a_torn_journal_and_a_second_writer(tmp_path):
    out = tmp_path / "o"
    journal = Journal(out, {"a": 1})
    journal.keep("0", [{"output": "x"}], {"r": "sha256:1"})
    with pytest.raises(Conflict, match="another process is writing"):
        Journal(out, {"a": 1})
    journal.close()
    path = tmp_path / "o.journal"
    path.write_bytes(path.read_bytes() + b'{"batch": "1", "ans')
    again = Journal(out, {"a": 1})
    assert again.resumed
    assert again.batch("0") == [{"output": "x"}]
    assert again.batch("1") is None
    assert again.pins == {"r": "sha256:1"}
    assert path.read_bytes().endswith(b"\n")
    again.finish()
