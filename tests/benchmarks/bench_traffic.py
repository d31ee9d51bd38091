"""The engine under traffic: the time to a first token beside heavy requests, and memory over a time.

    python tests/benchmarks/bench_traffic.py --base DIR [--part first,memory,bound] [--minutes 30] [--json FILE|-]

``first``: seconds from a request of one token with a LoRA to its answer (50th and 95th percentile), on an idle engine
and beside an ensemble of three LoRAs, a router that weighs them at each token, a prompt adapter, each writing without
end, and prompts of 4,000 tokens one after the other; ``to_idle`` is the ratio of the 95th percentiles. ``memory``: so
many clients ask one after another for ``--minutes``; the process's resident set, the bytes of the caches and the
processor seconds of a token, in the first and the last fifth. ``bound``: so many rows of long texts, and the most bytes
that their caches took beside rows x longest x layers x 2 x kv_heads x head_dim x itemsize.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from statistics import mean, median, quantiles
from typing import Any

import torch
from bench_tools import machine, report, resident

import compose
import router
from compose.base.location import locate
from compose.base.model import load_base
from hub.manifest import Draft
from hub.pack import pack
from hub.store import Store
from router.engine.engine import Engine
from router.engine.job import Job
from router.engine.request import Request

PARTS = ("first", "memory", "bound")


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="builtin:tiny-lm", help="a checkpoint's directory")
    parser.add_argument("--part", default=",".join(PARTS))
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--asked", type=int, default=40, help="requests whose time to the first token is taken, each")
    parser.add_argument("--long", type=int, default=4000, help="tokens of the long prompt")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--read", type=int, default=2000, help="tokens that a row of the bound reads")
    parser.add_argument("--write", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE|-")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(options, Path(place))
        rows = [row for part in options.part.split(",") for row in getattr(bench, part)()]
        bench.engine.close()
    columns = ("what", "value", "to_idle")
    report({"machine": machine(), "model": vars(options), "rows": rows}, columns, options.json, sys.stdout)


class Bench:
    """An engine with three LoRAs, a prompt, a router and an ensemble of them, published in a store of its own."""

    def __init__(self, options: argparse.Namespace, place: Path) -> None:
        self.options = options
        self.store = Store(place / "store")
        base = locate(options.base).directory
        self._publish(base, place)
        tokens = max(options.rows * (options.read + options.write), 2 * options.long, 16_384)
        self.engine = Engine(base, store=self.store, dtype=options.dtype, rows=options.rows, tokens=tokens)
        self.engine.host.model.generation_config.eos_token_id = []
        self.engine.host.context = None  # rows may write on and on: positions are not what is measured
        self.vocabulary = int(self.engine.host.model.config.vocab_size)
        self.draw = random.Random(0)

    def _publish(self, base: Path, place: Path) -> None:
        model = load_base(base, dtype="fp32")
        for i, (name, kind) in enumerate({"a0": "lora", "a1": "lora", "a2": "lora", "p": "prompt"}.items()):
            config: dict[str, Any] = {"r": 8, "target_modules": "all-linear"} if kind == "lora" else {}
            adapter = compose.create(model, kind, config, name=name, seed=i)
            for key, parameter in adapter.named_parameters():
                if key.endswith("B"):
                    parameter.data.normal_(std=0.02)
            compose.save(adapter.freeze(), place / name, model=model, task="causal_lm")
            (place / name / "README.md").write_text(f"# {name}\n", encoding="utf-8")
            identity, sites = compose.identity(model), tuple(adapter.paths)
            facts: dict[str, Any] = {"kind": kind, "method": "plain", "base": identity, "placement": sites}
            pack(place / name, Draft(name=f"local/{name}", version="1.0.0", task="causal_lm", **facts))
            self.store.put(place / name)
        members = [f"local/a{i}" for i in range(3)]
        router.fit(members, "arrow", "local/r@1.0.0", base=str(base), store=self.store)

    def ids(self, count: int) -> tuple[int, ...]:
        """Tokens of a text."""
        return tuple(self.draw.randrange(3, self.vocabulary) for _ in range(count))

    # -- the first token -------------------------------------------------------------------------------------------

    def first(self) -> Iterator[dict[str, Any]]:
        """A table row for each that is beside."""
        others = {
            "an ensemble": Request(ids=self.ids(32), adapter="ensemble.demix(a0, a1, a2)", max_new_tokens=4000),
            "a token router": Request(ids=self.ids(32), adapter="r", max_new_tokens=4000),
            "a prompt adapter": Request(ids=self.ids(32), adapter="p", max_new_tokens=4000),
            "long prompts": Request(ids=self.ids(self.options.long), adapter="a1", max_new_tokens=1),
        }
        for request in others.values():  # read and laid out once
            self._seconds(Request(ids=request.ids[:16], adapter=request.adapter, max_new_tokens=2))
        idle = self._first()
        yield {"what": "idle, p50 ms", "value": idle[0], "to_idle": 1.0}
        yield {"what": "idle, p95 ms", "value": idle[1], "to_idle": 1.0}
        for name, request in others.items():
            with self._again_and_again(request):
                found = self._first()
            yield {"what": f"beside {name}, p50 ms", "value": found[0], "to_idle": found[0] / idle[0]}
            yield {"what": f"beside {name}, p95 ms", "value": found[1], "to_idle": found[1] / idle[1]}

    def _first(self) -> tuple[float, float]:
        taken = []
        for _ in range(self.options.asked):
            taken.append(1e3 * self._seconds(Request(ids=self.ids(16), adapter="a0", max_new_tokens=1)))
            time.sleep(self.draw.random() * 0.05)
        return median(taken), quantiles(taken, n=20)[-1]

    def _seconds(self, request: Request) -> float:
        ended: SimpleQueue[Any] = SimpleQueue()
        began = time.perf_counter()
        self.engine.submit(request, ended.put)
        answer = ended.get()
        if getattr(answer, "written", None) != request.max_new_tokens:
            raise SystemExit(f"a request was not answered: {answer}")
        return time.perf_counter() - began

    @contextmanager
    def _again_and_again(self, request: Request) -> Iterator[None]:
        begun, over = threading.Event(), threading.Event()
        jobs: list[Job] = []

        def ask(_answer: Any = None) -> None:
            if not over.is_set():
                jobs.append(self.engine.submit(request, again))

        def again(_answer: Any) -> None:
            begun.set()
            threading.Thread(target=ask).start()

        ask()
        begun.wait(1.0)
        yield
        over.set()
        while any(self.engine.scheduler.counts):
            for job in list(jobs):
                self.engine.cancel(job)
            time.sleep(0.01)

    # -- memory ----------------------------------------------------------------------------------------------------

    def memory(self) -> Iterator[dict[str, Any]]:
        """Resident set, cache and time of a token at the beginning and at the end."""
        until = time.monotonic() + 60 * self.options.minutes
        written, samples = [0] * self.options.clients, []
        threads = [threading.Thread(target=self._client, args=(i, written, until)) for i in range(self.options.clients)]
        for thread in threads:
            thread.start()
        every = 60 * self.options.minutes / 100
        while any(thread.is_alive() for thread in threads):
            time.sleep(every)
            samples.append((sum(written), time.process_time(), resident("VmRSS"), self.engine.scheduler.work.bytes))
        samples = samples[2:-1]
        fifth = max(2, len(samples) // 5)
        start, end = samples[:fifth], samples[-fifth:]

        def token(part: list[tuple[int, float, int, int]]) -> float:
            return 1e3 * (part[-1][1] - part[0][1]) / max(1, part[-1][0] - part[0][0])

        for what, by in (("resident MiB", 2), ("cache MiB", 3)):
            values = [mean(sample[by] for sample in part) / 2**20 for part in (start, end)]
            yield {"what": f"{what}, first fifth", "value": values[0], "to_idle": 1.0}
            yield {"what": f"{what}, last fifth", "value": values[1], "to_idle": values[1] / max(values[0], 1e-9)}
        yield {"what": "CPU ms a token, first fifth", "value": token(start), "to_idle": 1.0}
        yield {"what": "CPU ms a token, last fifth", "value": token(end), "to_idle": token(end) / token(start)}
        yield {"what": "tokens written", "value": sum(written), "to_idle": "-"}

    def _client(self, number: int, written: list[int], until: float) -> None:
        draw = random.Random(number)
        kinds = ("a0", "a1", "a2", "p", None, "0.5 * a0 + a1", "ensemble.demix(a0, a1)", "r")
        while time.monotonic() < until:
            ids = tuple(draw.randrange(3, self.vocabulary) for _ in range(draw.choice((8, 40, 120))))
            count = draw.choice((8, 30, 90))
            ended: SimpleQueue[Any] = SimpleQueue()

            def piece(_piece: Any) -> None:
                written[number] += 1

            request = Request(ids=ids, adapter=draw.choice(kinds), max_new_tokens=count, temperature=0.8, seed=count)
            self.engine.submit(request, ended.put, piece)
            answer = ended.get()
            if getattr(answer, "written", None) != count:
                raise SystemExit(f"a request was not answered: {answer}")

    def bound(self) -> Iterator[dict[str, Any]]:
        """The most bytes of the caches, and what the formula says."""
        options, host = self.options, self.engine.host
        held, ended = [0], SimpleQueue[Any]()
        step = self.engine.scheduler.work.turn

        def turn() -> bool:
            went_on = step()
            held[0] = max(held[0], self.engine.scheduler.work.bytes)
            return went_on

        self.engine.scheduler.work.turn = turn  # type: ignore[method-assign]
        for i in range(options.rows):
            request = Request(ids=self.ids(options.read), adapter=f"a{i % 3}", max_new_tokens=options.write)
            self.engine.submit(request, partial(ended.put))
        for _ in range(options.rows):
            if getattr(answer := ended.get(), "written", None) != options.write:
                raise SystemExit(f"a row was not answered: {answer}")
        config = host.model.config
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        places = options.rows * (options.read + options.write)
        most = places * config.num_hidden_layers * 2 * heads * width * host.model.dtype.itemsize
        yield {"what": "cache MiB, the most", "value": held[0] / 2**20, "to_idle": "-"}
        yield {"what": "cache MiB, formula", "value": most / 2**20, "to_idle": held[0] / most}
        if held[0] > most:
            raise SystemExit("the caches took more than the formula says")


if __name__ == "__main__":
    main()
