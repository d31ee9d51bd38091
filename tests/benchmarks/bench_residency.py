"""Many adapters on one base: memory beside their bytes, reading them from disk, and a step of decoding beside them.

    python tests/benchmarks/bench_residency.py [--counts 1,100,1000] [--json FILE|-]

``memory`` is what the process has grown by (RSS) divided by the adapters' bytes; ``read_ms`` is reading and checking
one from disk, ``put_ms`` making it resident, ``swap_ms`` what a row takes longer if its adapter is not there and has to
push another out, ``peft_ms`` PEFT's load_adapter of the same files; ``step`` is a step of decoding rows with adapters
of their own divided by one of the bare base.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from bench_tools import interleave, llama, machine, ratio, report, shape_options
from peft import PeftModel

import compose
from router.engine.batches.decoding import DecodingBatch
from router.engine.batches.prefill import Reading
from router.engine.batches.running_row import RunningRow
from router.engine.engine import Engine
from router.engine.prepare import PreparedRow
from router.engine.request import Request

# Milliseconds are of the processor, which a busy machine does not change; only a GPU's have to be read off the wall.
clock = time.perf_counter if torch.cuda.is_available() else time.process_time


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--counts", default="1,100,1000", help="how many adapters are resident, one table row each")
    shape_options(parser, rows=16, prompt=16, layers=8, width=512, vocabulary=4096, rank=8, rounds=15)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    torch.manual_seed(0)
    counts = sorted({int(n) for n in options.counts.split(",")})
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(options, Path(place), most=max(counts) + options.rounds + 1)
        rows = [bench.measure(count) for count in counts]
    found = {"machine": machine(), "model": vars(options), "adapter_bytes": bench.size, "rows": rows}
    report(found, ("resident", "memory", "read_ms", "put_ms", "swap_ms", "peft_ms", "step"), options.json, sys.stdout)


def read(engine: Engine, rows: list[RunningRow]) -> DecodingBatch:
    """The batch of rows that have been read."""
    reading = Reading(engine.host, rows, steady=True)
    while not reading.advance(4096):
        pass
    assert reading.batch is not None
    return reading.batch


class Bench:
    """Adapters on disk, and an engine that comes to hold more and more of them."""

    def __init__(self, options: argparse.Namespace, place: Path, most: int) -> None:
        self.options = options
        base = llama(options)
        self.places = {f"a{i}": place / f"a{i}" for i in range(most)}
        maker = compose.create(base, "lora", {"r": options.rank, "target_modules": "all-linear"}, name="maker")
        for directory in self.places.values():
            with torch.no_grad():
                for parameter in maker.parameters():
                    parameter.normal_(std=0.02)
            compose.save(maker, directory, model=base)
        compose.eject(base)
        self.bare = Engine(copy.deepcopy(base), tokenizer=compose.tokenizer("builtin:tiny-lm"))
        self.peft = PeftModel.from_pretrained(copy.deepcopy(base), self.places["a0"], adapter_name="a0")
        self.engine = Engine(
            base, tokenizer=compose.tokenizer("builtin:tiny-lm"), adapters=self.places, rows=options.rows
        )
        self.size = self.engine.sources.known("a0").bytes
        gc.collect()
        self.before = psutil.Process().memory_info().rss

    def measure(self, count: int) -> dict[str, Any]:
        """Make so many resident and measure."""
        held = self.engine.residency
        names = list(self.places)[len(held.resident) : count]
        reads, puts = [], []
        for name in names:
            known = self.engine.sources.known(name)
            start = clock()
            adapter = known.read(self.engine.host)
            reads.append(clock() - start)
            del adapter
        for name in names:
            known = self.engine.sources.known(name)
            held.prefetch([known])
            held._coming[name][1].result()
            start = clock()
            with held.in_use([known]):
                puts.append(clock() - start)
        gc.collect()
        grown = psutil.Process().memory_info().rss - self.before
        return {
            "resident": len(held.resident),
            "memory": grown / held.bytes,
            "read_ms": median(reads) * 1e3,
            "put_ms": median(puts) * 1e3,
            "swap_ms": self._swap(count),
            "peft_ms": self._load_in_peft(),
            "step": self._step(count),
        }

    def _step(self, count: int) -> float:
        """A step of decoding rows with adapters of their own, divided by one of the bare base in the same round."""
        names = list(self.places)[:count]
        adapters = [names[i % count] for i in range(self.options.rows)]
        rows = [RunningRow(self._endless(self.engine, name), self.engine.host.tokenizer) for name in adapters]
        bare = [RunningRow(self._endless(self.bare, None), self.bare.host.tokenizer) for _ in rows]
        with self.engine.residency.in_use(self.engine.needed([row.prepared for row in rows])):
            ours, base = read(self.engine, rows), read(self.bare, bare)
            times = interleave({"ours": ours.step, "base": base.step}, self.options.rounds)
        return ratio(times["ours"], times["base"])

    @staticmethod
    def _endless(engine: Engine, adapter: str | None) -> PreparedRow:
        """A row that does not end by itself."""
        return replace(engine.prepare(Request(text="To be", adapter=adapter, max_new_tokens=1)), room=10**6)

    def _load_in_peft(self) -> float:
        """Milliseconds of PEFT's load_adapter, from the same directories."""
        times = []
        for name in list(self.places)[1 : self.options.rounds + 1]:
            start = clock()
            self.peft.load_adapter(self.places[name], name)
            times.append(clock() - start)
            self.peft.delete_adapter(name)
        return median(times) * 1e3

    def _swap(self, count: int) -> float:
        """Milliseconds that a row takes longer if its adapter is not resident and another has to go."""
        held, names = self.engine.residency, list(self.places)
        there, absent = [], []
        held.budget = held.bytes
        for new in names[-self.options.rounds :]:
            for times, name in ((absent, new), (there, new)):
                start = clock()
                self.engine.run([Request(text="To be", adapter=name, max_new_tokens=1)])
                times.append(clock() - start)
                self.engine.host.rest()
        held.budget = None
        for name in names[-self.options.rounds :]:
            held.drop(name)
        for name in names[:count]:
            with held.in_use([self.engine.sources.known(name)]):
                pass
        return (median(absent) - median(there)) * 1e3


if __name__ == "__main__":
    main()
