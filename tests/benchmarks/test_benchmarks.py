"""The benchmarks of compose run and report what they promise. Nothing here is timed."""

import json
import runpy
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SMALL = {"rows": 4, "prompt": 6, "layers": 1, "width": 64, "vocabulary": 50, "rounds": 1}


@pytest.fixture
def bench(monkeypatch, capsys):
    """Run a benchmark as a script and return its JSON report and the table it printed."""

    def run(name, *options, **shape):
        given = [f"--{key}={value}" for key, value in shape.items()]
        monkeypatch.syspath_prepend(HERE)
        monkeypatch.setattr(sys, "argv", [name, *options, *given, "--threads=1", "--json=-"])
        runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
        printed = capsys.readouterr()
        return json.loads(printed.out), printed.err

    return run


def test_mixed_batch(bench):
    report, table = bench("bench_mixed_batch", "--adapters=1,3,5", "--peft=3", "--resident=6", **SMALL, rank=2)
    assert [(row["adapters"], row["phase"]) for row in report["rows"]] == [
        (1, "decode"),
        (1, "prefill"),
        (3, "decode"),
        (3, "prefill"),
        (5, "decode"),
        (5, "prefill"),
    ]
    assert all(row["ours"] > 0 for row in report["rows"])
    assert [row["peft"] == "-" for row in report["rows"]] == [False] * 4 + [True] * 2
    assert 0 < report["largest_difference"] < 1e-4
    assert "threads" in report["machine"] and report["machine"] in table
    assert len(table.splitlines()) == 3 + 6


def test_mixed_kinds_and_the_plot(bench, tmp_path):
    picture = tmp_path / "cost.svg"
    shape = {**SMALL, "rank": 2}
    report, _ = bench(
        "bench_mixed_batch", "--adapters=2,6", "--kinds=lora,ia3,bottleneck", f"--plot={picture}", **shape
    )
    assert [row["adapters"] for row in report["rows"]] == [2, 2, 6, 6]
    assert all(row["ours"] > 0 and "peft" not in row for row in report["rows"])
    assert report["largest_difference"] < 1e-4
    assert picture.read_text("utf-8").count("<svg") == 1


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_single(bench, quantize):
    report, _ = bench("bench_single", f"--quantize={quantize}", "--kinds=dora,prompt", **SMALL, tokens=2)
    assert [(row["kind"], row["phase"]) for row in report["rows"]] == [
        ("dora", "forward"),
        ("dora", "generate"),
        ("prompt", "forward"),
        ("prompt", "generate"),
    ]
    assert all(row[side] > 0 for row in report["rows"] for side in ("ours", "peft", "ours_to_peft"))


def test_kernels(bench):
    report, _ = bench("bench_kernels", width=16, rank=2, layers=1, rounds=1)
    rows = report["rows"]
    assert {row["chosen"] for row in rows} == {"stacked", "gather", "grouped"}
    for row in rows:
        assert row[row["chosen"]] != "-", "the chosen backend must be among those measured"
    assert all(row["gather"] == "-" for row in rows if row["routed"])


def test_route_token(bench):
    shape = {**SMALL, "rows": 2, "width": 64, "rank": 2}
    report, table = bench("bench_route_token", "--experts=3,5", **shape)
    assert [row["experts"] for row in report["rows"]] == [3, 5]
    assert all(row[side] > 0 for row in report["rows"] for side in ("ours", "peft", "memory"))
    assert all(row["largest_difference"] < 1e-4 for row in report["rows"])
    assert len(table.splitlines()) == 2 + 1 + 2


def test_a_wrong_option_ends_with_usage(bench):
    with pytest.raises(SystemExit) as ended:
        bench("bench_mixed_batch", "--adaptors=3")
    assert ended.value.code == 2


def test_run(bench):
    shape = {**SMALL, "rows": 3, "prompt": 12, "vocabulary": 4096, "rank": 2}
    report, table = bench("bench_run", "--adapters=3", "--count=7", "--tokens=3", **shape)
    assert [row["way"] for row in report["rows"]] == ["ours", "peft_mixed", "peft_in_turn"]
    assert all(row["rows_per_s"] > 0 for row in report["rows"])
    assert report["alike"] == report["of"] == 7
    assert len(table.splitlines()) == 3 + 3


def test_residency(bench):
    shape = {**SMALL, "rows": 3, "vocabulary": 4096, "rank": 2}
    report, _ = bench("bench_residency", "--counts=1,5", **shape)
    assert [row["resident"] for row in report["rows"]] == [1, 5]
    assert all(row[name] > 0 for row in report["rows"] for name in ("read_ms", "put_ms", "step"))


def test_attach(bench):
    shape = {key: SMALL[key] for key in ("prompt", "layers", "width", "vocabulary", "rounds")}
    report, _ = bench("bench_attach", "--count=2", **shape, rank=2)
    assert [row["side"] for row in report["rows"]] == ["ours", "peft"]
    assert all(row[name] > 0 for row in report["rows"] for name in ("load_s", "load_cpu_s", "first_ms", "swap_ms"))
    assert report["adapter_bytes"] > 0


def test_structured(bench):
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    report, table = bench("bench_structured", "--rows=2", "--tokens=4", "--rounds=1")
    assert [row["grammar"] for row in report["rows"]] == ["object", "any JSON", "endless"]
    assert all(row["mask_us"] > 0 and row["read_ms"] > 0 for row in report["rows"])
    assert report["rows"][-1]["ratio"] > 0
    assert "mask_us" in table
