"""How long ``hub --help`` and ``hub list`` take from process start, beside Python's own start and an import of click.

    python tests/benchmarks/bench_hub_start.py [--rounds 15] [--artifacts 100] [--json FILE|-]

Prints medians in seconds and the ratio to ``python -c pass``. Budgets: ``hub --help`` 0.25 s, ``hub list`` 0.4 s.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from safetensors.numpy import save_file

import hub
from hub.manifest import Draft
from hub.pack import pack
from hub.store import Store

BUDGETS = {"hub --help": 0.25, "hub list": 0.4}


def fill(store: Store, count: int, directory: Path) -> None:
    save_file({"q.lora_A.weight": np.ones((4, 8), np.float32)}, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text("{}")
    for number in range(count):
        pack(directory, Draft(name=f"acme/adapter-{number // 4}", version=f"1.{number % 4}", kind="lora"))
        store.put(directory)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--artifacts", type=int, default=100)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    commands = {
        "python -c pass": ["-c", "pass"],
        "import click": ["-c", "import click"],
        "hub --help": ["-m", "hub", "--help"],
        "hub list": ["-m", "hub", "list"],
        "hub list --json": ["-m", "hub", "list", "--json"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as scratch:
        fill(Store(home), options.artifacts, Path(scratch))
        environment = {**os.environ, "HUB_HOME": home, "PYTHONPATH": str(Path(hub.__file__).parents[1])}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
        for turn in range(options.rounds + 1):
            for name, arguments in commands.items():
                start = time.perf_counter()
                subprocess.run([sys.executable, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)
                if turn:
                    times[name].append(time.perf_counter() - start)
    base = median(times["python -c pass"])
    rows = [
        {"command": name, "seconds": median(found), "ratio": median(found) / base, "budget": BUDGETS.get(name)}
        for name, found in times.items()
    ]
    report = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", "rows": rows}
    for row in rows:
        print(f"{row['command']:<16} {row['seconds']:.3f} s  {row['ratio']:5.1f}x", file=sys.stderr)
    if options.json is not None:
        text = json.dumps(report, indent=2)
        print(text) if str(options.json) == "-" else options.json.write_text(text)


if __name__ == "__main__":
    main()
