"""Rows a second of `hub run` on mixed rows of several adapters, against PEFT mixed in a batch and one after another.

    python tests/benchmarks/bench_run.py [--adapters 8] [--count 96] [--json FILE|-]

All three read the same adapters from PEFT directories, take the rows in the same batches' size sorted by length, and
decode greedily. ``peft_mixed`` passes ``adapter_names`` for each batch; ``peft_in_turn`` sets one adapter, answers its
rows, and goes on to the next. Ratios are to ours: above 1 is slower than ours.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_tools import interleave, llama, machine, ratio, report, shape_options
from peft import LoraConfig, PeftModel, get_peft_model

import compose
from hub.contents.rows import JsonLines
from router.engine.engine import Engine
from router.running.job import Stream, go
from router.running.rows import Options


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--count", type=int, default=96, help="rows of the file")
    parser.add_argument("--tokens", type=int, default=16, help="tokens written for each row")
    shape_options(parser, rows=32, prompt=32, layers=8, width=512, vocabulary=4096, rank=8, rounds=3)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        found = Bench(options, Path(place)).measure()
    found = {"machine": machine(), "model": vars(options), **found}
    report(found, ("way", "rows_per_s", "to_ours"), options.json, sys.stdout)


class Bench:
    """The same rows, adapters and base, three ways."""

    def __init__(self, options: argparse.Namespace, place: Path) -> None:
        self.options = options
        self.tokenizer = compose.tokenizer("builtin:tiny-lm")
        self.tokenizer.padding_side = "left"
        base = llama(options)
        self.names = [f"a{i}" for i in range(options.adapters)]
        self.peft = _peft(copy.deepcopy(base), self.names, options.rank)
        self.peft.save_pretrained(place)
        self.rows = self._rows()
        places = {name: place / name for name in self.names}
        self.engine = Engine(base, tokenizer=self.tokenizer, adapters=places, rows=options.rows)
        self.file = "".join(json.dumps(row) + "\n" for row in self.rows).encode()

    def measure(self) -> dict[str, Any]:
        """Rows a second each way, and how many rows they answer alike."""
        ours, mixed, turns = self._ours(), self._mixed(), self._in_turn()
        calls: dict[str, Callable[[], Any]] = {
            "ours": self._ours,
            "peft_mixed": self._mixed,
            "peft_in_turn": self._in_turn,
        }
        times = interleave(calls, self.options.rounds, warm=0)
        rows = [
            {
                "way": way,
                "rows_per_s": len(self.rows) / sorted(taken)[len(taken) // 2],
                "to_ours": ratio(taken, times["ours"]),
            }
            for way, taken in times.items()
        ]
        alike = sum(a == b == c for a, b, c in zip(ours, mixed, turns, strict=True))
        return {"rows": rows, "alike": alike, "of": len(self.rows)}

    def _rows(self) -> list[dict[str, str]]:
        ids = torch.randint(300, self.options.vocabulary, (self.options.count, self.options.prompt))
        keep = torch.randint(self.options.prompt // 4, self.options.prompt // 2, (self.options.count,))
        texts = [self.tokenizer.decode(row[:n]).replace("\ufffd", "") + " a" for row, n in zip(ids, keep, strict=True)]
        return [{"text": text, "adapter": self.names[i % len(self.names)]} for i, text in enumerate(texts)]

    def _ours(self) -> list[str]:
        out = io.BytesIO()
        asked = Options(adapter_column="adapter", max_new_tokens=self.options.tokens)
        go(self.engine, JsonLines(io.BytesIO(self.file), "rows"), asked, Stream(out))
        return [json.loads(line)["output"].strip() for line in out.getvalue().splitlines()]

    def _mixed(self) -> list[str]:
        return self._answer(range(len(self.rows)), mixed=True)

    def _in_turn(self) -> list[str]:
        found: dict[int, str] = {}
        for name in self.names:
            self.peft.set_adapter(name)
            own = [i for i, row in enumerate(self.rows) if row["adapter"] == name]
            found.update(zip(own, self._answer(own, mixed=False), strict=True))
        return [found[i] for i in range(len(self.rows))]

    @torch.inference_mode()
    def _answer(self, indices: Any, *, mixed: bool) -> list[str]:
        """Texts of rows, in the order of the indices, computed in batches sorted by length."""
        indices, found = list(indices), {}
        order = sorted(indices, key=lambda i: len(self.rows[i]["text"]))
        for start in range(0, len(order), self.options.rows):
            batch = order[start : start + self.options.rows]
            encoded = self.tokenizer([self.rows[i]["text"] for i in batch], return_tensors="pt", padding=True)
            encoded.pop("token_type_ids", None)
            extra = {"adapter_names": [self.rows[i]["adapter"] for i in batch]} if mixed else {}
            made = self.peft.generate(**encoded, **extra, max_new_tokens=self.options.tokens, do_sample=False)
            texts = self.tokenizer.batch_decode(made[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
            found.update(zip(batch, (text.strip() for text in texts), strict=True))
        return [found[i] for i in indices]


def _peft(base: Any, names: list[str], rank: int) -> PeftModel:
    config = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.05)
    return model.eval()


if __name__ == "__main__":
    main()
