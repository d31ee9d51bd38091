"""Tokens a second of the engine in processor seconds: beside transformers, PEFT's ``adapter_names`` and vLLM on CPU.

    python tests/benchmarks/bench_engine.py --base DIR [--adapters 0,1,8,32] [--arriving 200] [--dtype bf16]
        [--vllm PYTHON] [--ways ours,transformers,peft,vllm] [--json FILE|-]

Two measurements, each with 0 (the bare base) or more LoRAs. ``batch``: so many rows at once. ``arriving``: requests of
mixed lengths, of which the n-th comes when the way that answers has computed for n times ``--every`` seconds, or has
nothing left to do; what cannot let rows join answers batches of those that have come, sorted by length. Every row
writes all of its tokens, greedily. ``transformers`` is `generate` of the bare base, or with one adapter of PEFT's for
all rows, whatever number of adapters the others have; ``peft`` mixes the adapters with ``adapter_names``. ``vllm`` runs
in a process of its own with the Python given by ``--vllm`` (a virtual environment in which vLLM for CPU is installed),
eagerly and on one thread. Processor seconds are of the whole process, so other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench_tools import machine, report
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from router.engine.engine import Engine
from router.engine.request import Request

WAYS = ("ours", "transformers", "peft", "vllm")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Row:
    """A row to be answered: its tokens, how many to write, the name of its adapter, and when it comes (seconds)."""

    ids: list[int]
    tokens: int
    adapter: str | None
    at: float = 0.0


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="builtin:tiny-lm", help="a checkpoint's directory")
    parser.add_argument("--adapters", default="0,1,8,32", help="how many LoRAs, one group of table rows each")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--vllm", metavar="PYTHON", help="a Python that has vLLM for CPU; else it is left out")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    for name, value in {"rows": 32, "prompt": 48, "tokens": 32, "arriving": 200, "rank": 8, "rounds": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--every", type=float, default=0.1, help="processor seconds between two arrivals")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE|-")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        found = Bench(options, Path(place)).measure()
    columns = ("adapters", "load", "way", "tokens", "cpu_s", "tokens_per_s")
    report({"machine": machine(), "model": vars(options), "rows": found}, columns, options.json, sys.stdout)


class Bench:
    """The same rows and adapters, answered in several ways."""

    def __init__(self, options: argparse.Namespace, place: Path) -> None:
        self.options, self.place = options, place
        self.counts = [int(n) for n in options.adapters.split(",")]
        self.names = [f"a{i}" for i in range(max(1, *self.counts))]
        self.base = _directory(options.base)
        self.bare = AutoModelForCausalLM.from_pretrained(self.base, dtype=DTYPES[options.dtype]).eval()
        self.vocabulary = self.bare.config.vocab_size
        self.peft = _with_loras(self.bare, self.names, options.rank, place)

    def measure(self) -> list[dict[str, Any]]:
        """A row for each number of adapters, load and way."""
        loads = [(n, load, self._rows(n, load)) for n in self.counts for load in ("batch", "arriving")]
        loads = [one for one in loads if one[2]]
        ways = {w: getattr(self, f"_{w}") for w in self.options.ways.split(",") if w in WAYS}
        seconds: dict[tuple[int, str, str], float] = {}
        for way, measured in ways.items():
            if way == "vllm" and not self.options.vllm:
                print("vllm is left out: --vllm PYTHON names a Python that has it", file=sys.stderr)
                continue
            for (n, load, _), taken in zip(loads, measured(loads), strict=True):
                seconds[n, load, way] = taken
        return [
            {
                "adapters": n,
                "load": load,
                "way": way,
                "tokens": (written := sum(row.tokens for row in rows)),
                "cpu_s": seconds[n, load, way],
                "tokens_per_s": written / seconds[n, load, way],
            }
            for n, load, rows in loads
            for way in ways
            if (n, load, way) in seconds
        ]

    def _rows(self, adapters: int, load: str) -> list[Row]:
        draw = random.Random(1)
        found = []
        for i in range(self.options.rows if load == "batch" else self.options.arriving):
            read, write, at = self.options.prompt, self.options.tokens, 0.0
            if load == "arriving":
                read, write = draw.randint(read // 4, 2 * read), draw.randint(write // 4, 2 * write)
                at = i * self.options.every
            name = self.names[i % adapters] if adapters else None
            found.append(Row([draw.randrange(self.vocabulary) for _ in range(read)], write, name, at))
        return found

    def _ours(self, loads: Sequence[tuple[int, str, list[Row]]]) -> Iterable[float]:
        adapters = {name: self.place / name for name in self.names}
        engine = Engine(self.base, adapters=adapters, dtype=self.options.dtype, rows=self.options.rows)
        engine.host.model.generation_config.eos_token_id = []  # every row writes all of its tokens
        self._answer(engine, [Row(row.ids, 2, row.adapter) for row in loads[-1][2][: self.options.rows]])
        yield from (min(self._answer(engine, rows) for _ in range(self.options.rounds)) for _, _, rows in loads)
        engine.close()

    @staticmethod
    def _answer(engine: Engine, rows: Sequence[Row]) -> float:
        left, change = len(rows), threading.Condition()
        short: list[Any] = []

        def done(answer: Any, wanted: int) -> None:
            nonlocal left
            if getattr(answer, "written", None) != wanted:
                short.append(answer)
            with change:
                left -= 1
                change.notify_all()

        began = time.process_time()
        for i, row in enumerate(rows):
            while time.process_time() - began < row.at and left > len(rows) - i:
                with change:
                    change.wait(0.01)
            request = Request(ids=tuple(row.ids), adapter=row.adapter, max_new_tokens=row.tokens)
            engine.submit(request, lambda answer, wanted=row.tokens: done(answer, wanted))
        with change:
            while left:
                change.wait()
        if short:
            raise SystemExit(f"a row was not answered as it should be: {short[0]}")
        return time.process_time() - began

    def _transformers(self, loads: Sequence[tuple[int, str, list[Row]]]) -> Iterable[float]:
        return [self._in_batches(rows, {"names": False, "bare": not n}) for n, _, rows in loads]

    def _peft(self, loads: Sequence[tuple[int, str, list[Row]]]) -> Iterable[float]:
        return [self._in_batches(rows, {"names": n > 1, "bare": not n}) for n, _, rows in loads]

    @torch.inference_mode()
    def _in_batches(self, rows: Sequence[Row], how: dict[str, bool]) -> float:
        self._generate([Row(row.ids, 2, row.adapter) for row in rows[: self.options.rows]], **how)
        waiting, began = list(rows), time.process_time()
        while waiting:
            now = time.process_time() - began
            come = [row for row in waiting if row.at <= now] or waiting[:1]
            batch = sorted(come, key=lambda row: len(row.ids) + row.tokens)[: self.options.rows]
            self._generate(batch, **how)
            waiting = [row for row in waiting if not any(row is one for one in batch)]
        return time.process_time() - began

    def _generate(self, batch: Sequence[Row], *, names: bool, bare: bool) -> None:
        width = max(len(row.ids) for row in batch)
        ids, mask = torch.zeros(len(batch), width, dtype=torch.long), torch.zeros(len(batch), width, dtype=torch.long)
        for i, row in enumerate(batch):
            ids[i, width - len(row.ids) :], mask[i, width - len(row.ids) :] = torch.tensor(row.ids), 1
        most = max(row.tokens for row in batch)
        options: dict[str, Any] = {"max_new_tokens": most, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
        if names:
            options["adapter_names"] = [row.adapter for row in batch]
        if bare:
            with self.peft.disable_adapter():
                self.peft.generate(input_ids=ids, attention_mask=mask, **options)
            return
        if not names:
            self.peft.set_adapter(self.names[0])
        self.peft.generate(input_ids=ids, attention_mask=mask, **options)

    def _vllm(self, loads: Sequence[tuple[int, str, list[Row]]]) -> Iterable[float]:
        longest = max(len(row.ids) + row.tokens for _, _, rows in loads for row in rows)
        asked = {
            "base": str(self.base),
            "adapters": {name: str(self.place / name) for name in self.names},
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[self.options.dtype],
            "rows": self.options.rows,
            "rank": self.options.rank,
            "longest": longest + 1,
            "loads": [{"adapters": n, "rows": [asdict(row) for row in rows]} for n, _, rows in loads],
        }
        alone = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(self.options.threads),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its work in one process, whose seconds are counted
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        script = Path(__file__).with_name("engine_vllm.py")
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | alone
        with (self.place / "asked.json").open("w") as file:
            json.dump(asked, file)
        told = self.place / "told.json"
        call = [self.options.vllm, str(script), str(self.place / "asked.json"), str(told)]
        subprocess.run(call, check=True, env=environment, stdout=sys.stderr)
        return list(json.loads(told.read_text()))


def _directory(base: str) -> Path:
    from compose.base.location import locate

    return locate(base).directory


def _with_loras(bare: Any, names: Sequence[str], rank: int, place: Path) -> PeftModel:
    """PEFT's model with random LoRAs on every linear layer, which are written to a directory each."""
    config = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(bare, config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.02)
        model.save_pretrained(place)
    return model.eval()


if __name__ == "__main__":
    main()
