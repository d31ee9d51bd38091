"""What following a grammar costs: a token's mask alone, and writing by rows that follow one beside rows that do not.

    python tests/benchmarks/bench_structured.py [--base DIR] [--rows 8] [--tokens 64] [--rounds 3] [--json FILE|-]

Processor time. `mask_us` is a row's mask and its step in the grammar, `first_us` that of a row's first token, `read_ms`
the reading of a grammar the first time; `step_ms` is a token of rows that write side by side, for the grammar that lets
none of them end before the others.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from bench_tools import machine, report

from router.engine.engine import Engine
from router.engine.grammar import Grammar
from router.engine.request import Request

TEXT = {"type": "string"}
GRAMMARS = {
    "object": Grammar.json_schema(
        {
            "type": "object",
            "properties": {"name": TEXT, "age": {"type": "integer"}, "tags": {"type": "array", "items": TEXT}},
            "required": ["name", "age", "tags"],
            "additionalProperties": False,
        }
    ),
    "any JSON": Grammar.json_schema({"type": "object"}),
    "endless": Grammar("regex", "[a-z ]{500,}"),
}


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="builtin:tiny-lm")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", default=None)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    engine = Engine(options.base, dtype="fp32", rows=options.rows)
    began = time.process_time()
    engine.host.grammars.get(Grammar("regex", "a"))
    tokens_ms = 1e3 * (time.process_time() - began)
    rows = [measure(engine, name, grammar, options) for name, grammar in GRAMMARS.items()]
    told = {"base": options.base, "vocabulary": engine.host.vocabulary, "tokenizer_read_ms": tokens_ms}
    columns = ("grammar", "read_ms", "first_us", "mask_us", "step_ms", "free_step_ms", "ratio")
    report({"machine": machine(), "model": {**vars(options), **told}, "rows": rows}, columns, options.json, sys.stdout)
    engine.close()


def measure(engine: Engine, name: str, grammar: Grammar, options: argparse.Namespace) -> dict[str, Any]:
    """One grammar."""
    began = time.process_time()
    compiled = engine.host.grammars.compile(grammar)
    read_ms = 1e3 * (time.process_time() - began)
    row, spent = compiled.begin(), []
    noise = torch.Generator().manual_seed(0)
    for _ in range(options.tokens):
        logits = torch.randn(engine.host.vocabulary, generator=noise)
        began = time.process_time()
        masked = row.mask(logits)
        assert masked is not None
        row.take(int(masked.argmax()))
        spent.append(1e6 * (time.process_time() - began))
        if row.done:
            break
    told: dict[str, Any] = {"grammar": name, "read_ms": read_ms, "first_us": spent[0]}
    told |= {"mask_us": statistics.median(spent[1:] or spent), "step_ms": "-", "free_step_ms": "-", "ratio": "-"}
    if name == "endless":
        pairs = [(step(engine, grammar, options), step(engine, None, options)) for _ in range(options.rounds)]
        bound, free = (statistics.median(times) for times in zip(*pairs, strict=True))
        told |= {"step_ms": bound, "free_step_ms": free, "ratio": bound / free}
    return told


def step(engine: Engine, grammar: Grammar | None, options: argparse.Namespace) -> float:
    """Milliseconds of processor time for each token of each row."""
    shared: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": options.tokens, "grammar": grammar}
    rows = [Request(text="It was a dark night", seed=seed, **shared) for seed in range(options.rows)]
    began = time.process_time()
    written = sum(answer.written for answer in engine.run(rows))  # type: ignore[union-attr]  # an error is raised
    return 1e3 * (time.process_time() - began) / written


if __name__ == "__main__":
    main()
