"""`hub run` over every format: the same answers, columns kept, bad rows in their place, the same bytes after kills."""

from __future__ import annotations

import csv
import gzip
import json
import os
import signal
from datetime import date
from pathlib import Path

import pytest
from click.testing import CliRunner

from hub.cli import main
from hub.contents.rows import open_rows
from router.engine.engine import Engine
from router.running.journal import Journal
from router.running.rows import Options
from router.running.run import run
from router.running.tables import write_table

parquet = pytest.importorskip("pyarrow.parquet")
BASE = "builtin:tiny-lm"
FORMATS = ("jsonl", "jsonl.gz", "csv", "tsv", "parquet")
ROWS = [
    {"id": str(i), "text": text, "adapter": adapter}
    for i, (text, adapter) in enumerate(
        [("The parties, agree\nthat", "law"), ('def "main"(', "code"), ("one film", "mood"), ("a\ttab", "topic")] * 3
    )
]


def write(path: Path, rows=ROWS) -> Path:
    import pyarrow

    form = path.name.partition(".")[2]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if form == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif form in ("csv", "tsv", "csv.gz"):
        with gzip.open(path, "wt", newline="") if form == "csv.gz" else path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if form == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_bytes(gzip.compress(text.encode()) if form.endswith("gz") else text.encode())
    return path


def read(path: Path) -> list[dict]:
    with open_rows(path) as lines:
        return [line.row for line in lines]


def plain(row: dict) -> dict:
    """Without what a row does not have; objects as the JSON that a table holds."""
    kept = {name: value for name, value in row.items() if value not in (None, "")}
    return {name: json.dumps(v, ensure_ascii=False) if isinstance(v, dict | list) else v for name, v in kept.items()}


@pytest.fixture
def hub(published, monkeypatch):
    monkeypatch.setenv("HUB_HOME", str(published.store.root))

    def call(*words, code=0):
        found = CliRunner().invoke(main, [str(word) for word in words])
        assert found.exit_code == code, found.output
        return found

    return call


def test_all_formats_say_the_same(hub, tmp_path):
    asked = ("--base", BASE, "--adapter-column", "adapter", "--scores", 2, "--max-new-tokens", 3)
    source = write(tmp_path / "rows.jsonl")
    hub("run", source, *asked, "--out", tmp_path / "first.jsonl")
    first = [plain(row) for row in read(tmp_path / "first.jsonl")]
    assert [row["id"] for row in first] == [row["id"] for row in ROWS]
    assert {"output", "output_scores"} <= first[2].keys() and "output_finish" in first[0]
    for form, into in zip((*FORMATS, "csv.gz"), (*FORMATS[1:], "jsonl", "csv"), strict=True):
        out = tmp_path / f"out-{form}.{into}"
        hub("run", write(tmp_path / f"in.{form}"), *asked, "--out", out)
        rows = read(out)
        assert list(rows[0])[:3] == ["id", "text", "adapter"], "columns are kept, in their order"
        for row, other in zip(rows, first, strict=True):
            scores = row.pop("output_scores"), other["output_scores"]
            told = [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in scores]
            assert json.loads(told[0]) == json.loads(told[1])
            assert plain(row) == {name: value for name, value in other.items() if name != "output_scores"}
        assert not [path for path in tmp_path.iterdir() if path.name.startswith((out.name + ".", f".{out.name}"))]


def test_a_parquet_file_keeps_its_types(tmp_path):
    import pyarrow

    source, rows, out = tmp_path / "in.parquet", tmp_path / "rows", tmp_path / "out.parquet"
    days = pyarrow.array([date(2020, 1, n + 1) for n in range(3)])
    parquet.write_table(pyarrow.table({"day": days, "raw": [b"\xff", b"", None], "n": [1, 2, 3]}), source)
    answers = [{"output": "a", "output_scores": {"x": 0.5}}, {"output": None, "output_error": "no"}, {"output": "b"}]
    rows.write_text("".join(json.dumps({"day": "-", **answer}) + "\n" for answer in answers))
    write_table(rows, out, source=source, into="output")
    made = parquet.read_table(out)
    assert made.column("day").to_pylist()[2] == date(2020, 1, 3) and made.column("raw").to_pylist()[0] == b"\xff"
    assert made.schema.names == ["day", "raw", "n", "output", "output_scores", "output_error"]
    assert made.column("output_scores").to_pylist() == ['{"x": 0.5}', None, None]
    assert made.column("output_error").to_pylist() == [None, "no", None]


BAD = {
    "jsonl": ('{"id": 0, "text": "To be"}\n{oops\n\n{"id": 2, "text": 5}\n{"id": 3, "text": "To be"}\n\n \n', 2),
    "csv": ('id,text\n0,To be\n1,too,many\n\n2,\n3,"To be"\n\n', 3),
    "tsv": ('id\ttext\n0\tTo be\n1\t"a"b\n2\t\n3\tTo be\n', 3),
}


@pytest.mark.parametrize("form", sorted(BAD))
def test_a_bad_row_is_an_error_in_its_place_and_the_end_is_1(hub, tmp_path, form):
    text, line = BAD[form]
    source = tmp_path / f"rows.{form}"
    source.write_text(text)
    found = hub("run", source, "--base", BASE, "--max-new-tokens", 2, code=1)
    rows = [json.loads(row) for row in found.stdout.splitlines()]
    good = [row for row in rows if row["output"] is not None]
    assert [int(row["id"]) for row in good] == [0, 3] and good[0]["output"] == good[1]["output"]
    assert len(rows) == (5 if form == "jsonl" else 4), "blank lines at the end are no rows"
    bad = [row["output_error"] for row in rows if row["output"] is None]
    assert f"line {line}" in bad[0] and str(source) in bad[0]
    assert f"{len(bad)} of {len(rows)} rows failed" in found.stderr
    told = hub("run", source, "--base", BASE, "--on-error", "stop", code=1)
    assert f"line {line}" in told.stderr and told.stdout == ""


def test_what_is_no_such_file_is_refused_before_anything_is_loaded(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("router.running.run.Engine", None)
    rows = write(tmp_path / "rows.jsonl")
    for name, content, words in [
        ("a.jsonl.gz", b"no gzip", "is not whole gzip"),
        ("a.parquet", b"no parquet", "not a readable parquet"),
        ("a.json", b"[1,", "is no JSON"),
        ("a.csv", b"", "names no columns"),
        ("b.csv", b"text,text\n1,2\n", "names 'text' twice"),
    ]:
        (tmp_path / name).write_bytes(content)
        asked = ("run", tmp_path / name, "--base", BASE, "--on-error", "stop")
        assert words in hub(*asked, code=1).stderr
    for out, words in [("o.csv.gz", "written plain"), ("o.json", "one a line")]:
        assert words in hub("run", rows, "--base", BASE, "--out", tmp_path / out, code=2).stderr


@pytest.mark.parametrize("form", FORMATS)
def test_killed_and_gone_on_with_every_format_ends_in_the_same_bytes(published, tmp_path, form, monkeypatch):
    monkeypatch.setenv("HUB_HOME", str(published.store.root))
    monkeypatch.setattr("router.running.job.WINDOW", 2)
    source, out, whole = write(tmp_path / f"in.{form}", ROWS * 2), tmp_path / f"out.{form}", tmp_path / f"whole.{form}"
    asked = {"base": BASE, "adapter_column": "adapter", "max_new_tokens": 3, "scores": 2, "batch_size": 2}
    engine = Engine(BASE, store=published.store, dtype="fp32", rows=2)  # its threads begin in each child
    monkeypatch.setattr("router.running.run.Engine", lambda *_, **__: engine)
    for kill in (("commit", 1), ("keep", 3), ("commit", 2), ("finish", 1), None):
        status = apart(lambda kill=kill: run(source, out, **asked, on_resume=die_at(kill)))
        assert os.WIFSIGNALED(status) == (kill is not None), kill
    assert status == 0 == apart(lambda: run(source, whole, **asked))
    assert out.read_bytes() == whole.read_bytes()
    assert len(read(out)) == len(ROWS) * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"in.{form}", f"out.{form}", f"whole.{form}"])


def apart(call) -> int:
    """Call in a process of its own; its exit status."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            call()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def die_at(kill):
    """Let this process be killed right behind the nth commit or batch, or before the end."""
    if kill is None:
        return lambda rows: None
    (name, left), seen = kill, []
    act = getattr(Journal, name)

    def dying(self, *given):
        if name != "finish":
            act(self, *given)
        seen.append(name)
        if len(seen) == left:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(Journal, name, dying)
    return lambda rows: None


def test_chats_are_put_into_the_template(hub, published, tmp_path):
    """A row with messages, and --chat: both are what the template makes of them, without the tokens it has already."""
    engine = Engine(BASE, store=published.store, dtype="fp32")
    engine.host.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
    )
    turns = [{"role": "user", "content": "To be"}]
    rows = [{"messages": turns}, {"messages": json.dumps(turns)}, {"messages": [{"role": "user"}]}, {"messages": 5}]
    source, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    from router.running.job import Stream, go

    with source.open("rb") as stream, out.open("wb") as file, open_rows(stream) as lines:
        go(engine, lines, Options(max_new_tokens=3), Stream(file))
    said = read(out)
    from router.engine.request import Request

    expected = engine.run([Request(text="<user>To be\n<assistant>", special=False, max_new_tokens=3)])[0].text
    assert [row["output"] for row in said] == [expected, expected, None, None]
    assert "line 3" in said[2]["output_error"] and "turns with a role" in said[2]["output_error"]
    source.write_text(json.dumps({"text": "To be"}) + "\n")
    with source.open("rb") as stream, out.open("wb") as file, open_rows(stream) as lines:
        go(engine, lines, Options(max_new_tokens=3, chat=True), Stream(file))
    assert read(out)[0]["output"] == expected
    engine.close()
    told = hub("run", source, "--base", BASE, "--chat", code=1)
    assert "no chat template" in json.loads(told.stdout)["output_error"]


def test_expressions_name_directories_as_compose_check_takes_them(hub, published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("law", "mood"):
        published.store.get(f"local/{name}").materialize(tmp_path / name)
    rows = write(tmp_path / "rows.jsonl", [{"text": "The parties agree"}] * 2)
    named = hub("run", rows, "--expr", "local/law", "--max-new-tokens", 4).stdout
    assert hub("run", rows, "--expr", '"./law"', "--max-new-tokens", 4).stdout == named, "the base is found, too"
    mixed = ("run", rows, "--max-new-tokens", 4)
    expected = hub(*mixed, "--expr", "0.5 * local/law + local/code").stdout
    assert hub(*mixed, "--expr", '0.5 * "./law" + c', "--adapter", "c=local/code").stdout == expected
    assert json.loads(hub(*mixed, "--expr", '"./mood"').stdout.splitlines()[0])["output"] in {"bad", "good"}
    assert "there is no directory ./lwa" in hub(*mixed, "--expr", '"./lwa"', code=1).stderr
    out = ("--out", tmp_path / "out.jsonl")
    hub(*mixed, "--expr", 'at("./law", layers=[0])', "--device", "cpu", *out)
    limited = (tmp_path / "out.jsonl").read_text()
    assert limited != named and limited == hub(*mixed, "--expr", "at(local/law, layers=[0])").stdout


def test_rows_of_a_file_may_not_name_directories(hub, published, tmp_path):
    published.store.get("local/law").materialize(tmp_path / "law")
    rows = write(tmp_path / "rows.jsonl", [{"text": "To be", "adapter": str(tmp_path / "law")}])
    assert hub("run", rows, "--base", BASE, "--adapter-column", "adapter", code=1)


def test_a_table_is_made_of_all_its_rows(tmp_path):
    rows, out = tmp_path / "rows", tmp_path / "o.csv"
    rows.write_text('{"a": 1}\n{"b": [1, "é"], "a": null}\n{"c": true, "a": "x,\\n"}\n')
    write_table(rows, out, source=None, into="output")
    assert out.read_text() == 'a,b,c\n1,,\n,"[1, ""é""]",\n"x,\n",,true\n'
    write_table(rows, tmp_path / "o.parquet", source=None, into="output")
    assert parquet.read_table(tmp_path / "o.parquet").column("a").to_pylist() == ["1", None, "x,\n"]
