"""E2E NLG with a causal base: text from meaning representations, by methods against full fine-tuning.

    python tests/benchmarks/real_generation.py TRAIN.jsonl TEST.jsonl --out runs.jsonl [--base builtin:tiny-lm]
    python tests/benchmarks/real_generation.py TRAIN.jsonl TEST.jsonl --out runs.jsonl --table

Lines hold `mr` and `ref`; an `mr` that comes several times has several references. Answers are greedy. BLEU is
sacrebleu's (13a, all references), ROUGE-L the F1 of the best reference; both in percent. Each run is a line of
runs.jsonl, and one that is there is not run again. The first seed goes through all methods before the second starts.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_tools import machine

import compose
from train.config import TrainConfig
from train.data.datasets import encode, read_rows
from train.loop import fit
from train.method import Composite, make_method
from train.seeds import derive, generator
from train.steps.evaluate import evaluate

# Rates differ by what moves: whole weights, matrices beside them, what stands before the text.
METHODS: dict[str, tuple[float, dict[str, Any]]] = {
    "full": (5e-4, {}),
    "lora": (3e-3, {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}),
    "houlsby": (3e-3, {"bottleneck_size": 24}),
    "prefix": (1e-3, {"num_virtual_tokens": 16}),
}
SETTINGS = ("base", "rows", "epochs", "inputs", "precision")
_SLOT = re.compile(r"(\w[\w ]*)\[([^\]]*)\]")


def prompt(mr: str) -> str:
    """`name[Aromi], food[Chinese]` as `name: Aromi | food: Chinese` and a new line."""
    return " | ".join(f"{name}: {value}" for name, value in _SLOT.findall(mr)) + "\n"


def references(path: Path, count: int) -> dict[str, list[str]]:
    """The references of `count` distinct inputs, drawn from all."""
    found: dict[str, list[str]] = {}
    for row in read_rows(path):
        found.setdefault(row["mr"], []).append(row["ref"])
    names = list(found)
    drawn = torch.randperm(len(names), generator=generator(0, "inputs"))[:count].tolist()
    return {names[i]: found[names[i]] for i in drawn}


def learning_rows(path: Path, count: int) -> list[dict[str, str]]:
    """Rows to learn from."""
    rows = read_rows(path)
    drawn = torch.randperm(len(rows), generator=generator(0, "rows"))[:count].tolist()
    return [{"prompt": prompt(rows[i]["mr"]), "completion": rows[i]["ref"]} for i in drawn]


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: list[str], size: int = 50) -> list[str]:
    """Greedy continuations, batched with the padding on the left."""
    model.eval()
    pad, end = tokenizer.pad_token_id or 0, tokenizer.eos_token_id
    texts = []
    for start in range(0, len(prompts), size):
        ids = tokenizer(prompts[start : start + size], verbose=False)["input_ids"]
        longest = max(map(len, ids))
        batch = torch.tensor([[pad] * (longest - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
        options = {"max_new_tokens": 80, "do_sample": False, "pad_token_id": pad, "eos_token_id": end}
        out = model.generate(input_ids=batch, attention_mask=mask, **options)[:, longest:]
        texts += [tokenizer.decode(row, skip_special_tokens=True).strip() for row in out]
    return texts


def scores(said: list[str], wanted: list[list[str]]) -> dict[str, float]:
    """BLEU over the corpus and the mean of the best ROUGE-L."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    most = max(map(len, wanted))
    streams = [[refs[i] if i < len(refs) else None for refs in wanted] for i in range(most)]
    scorer = RougeScorer(["rougeL"])
    best = [
        max(scorer.score(ref, text)["rougeL"].fmeasure for ref in refs) for text, refs in zip(said, wanted, strict=True)
    ]
    return {"bleu": sacrebleu.corpus_bleu(said, streams).score, "rouge_l": 100 * statistics.mean(best)}


def one(given: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """Train, write, compare."""
    lr, options = METHODS[method]
    run = TrainConfig(
        base=given.base,
        method=method,
        options=options,
        precision=given.precision,
        max_length=256,
        batch_size=16,
        duration=f"{given.epochs} epochs",
        lr=lr,
        warmup=0.1,
        group_by_length=True,
        seed=seed,
    )
    way, run = make_method(run)
    tokenizer = compose.tokenizer(given.base)
    data = encode(learning_rows(given.train, given.rows), run, tokenizer, source="train")
    model = compose.load(given.base, dtype="fp32")
    learner = way.build(model, seed=derive(seed, "init"), tokenizer=tokenizer)
    way.warm(model, learner, data)
    trainable = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    started = time.process_time()
    fit(model, learner, data, None, run, method=way)
    seconds = time.process_time() - started
    stored = way.finish(model, learner)
    members = stored.members.values() if isinstance(stored, Composite) else (stored,)
    total = sum(v.numel() for m in members for v in m.state().values())
    for member in members:
        member.freeze()
    found = references(given.test, given.inputs)
    held = [{"prompt": prompt(mr), "completion": ref} for mr, refs in found.items() for ref in refs[:1]]
    loss = evaluate(model, encode(held, run, tokenizer, source="test"), batch_size=32)["loss"]
    said = answers(model, tokenizer, [prompt(mr) for mr in found])
    example = {"input": next(iter(found)), "output": said[0]}
    measured = scores(said, list(found.values()))
    return {**measured, "loss": loss, "trained": trainable, "stored": total, "seconds": seconds, "example": example}


def key(run: dict[str, Any]) -> tuple[Any, ...]:
    """What makes a run the same as another."""
    return tuple(run[name] for name in ("method", "seed", "lr", *SETTINGS))


def table(runs: list[dict[str, Any]]) -> str:
    """A row for each method, the best BLEU first."""
    columns = ("method", "BLEU", "ROUGE-L", "held-out loss", "seeds", "trained", "stored", "rate", "seconds")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    current = [r for r in runs if r["lr"] == METHODS[r["method"]][0]]
    by = {name: [r for r in current if r["method"] == name] for name in dict.fromkeys(r["method"] for r in current)}
    for name, own in sorted(by.items(), key=lambda pair: -statistics.mean(r["bleu"] for r in pair[1])):
        cells = [
            _spread([r[field] for r in own], digits) for field, digits in (("bleu", 1), ("rouge_l", 1), ("loss", 2))
        ]
        counts = [str(len(own)), f"{own[0]['trained']:,}", f"{own[0]['stored']:,}", f"{METHODS[name][0]:g}"]
        seconds = f"{statistics.mean(r['seconds'] for r in own):.0f}"
        lines.append(f"| {' | '.join([name, *cells, *counts, seconds])} |")
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    told = f"{statistics.mean(values):.{digits}f}"
    return told + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def main() -> None:
    """Run what is missing, or print the table of what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="a line of JSON for each run")
    parser.add_argument("--base", default="builtin:tiny-lm", help="a causal model")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--inputs", type=int, default=200, help="distinct test inputs")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32", help="of the training")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--table", action="store_true", help="run nothing: print the table of --out as Markdown")
    given = parser.parse_args()
    runs = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    if given.table:
        print(table(runs))
        return
    done = {key(run) for run in runs}
    for seed in map(int, given.seeds.split(",")):
        for method in given.methods.split(","):
            run = {"method": method, "seed": seed, "lr": METHODS[method][0]}
            run |= {name: getattr(given, name) for name in SETTINGS}
            if key(run) in done:
                continue
            run |= one(given, method, seed) | {"machine": machine()}
            with given.out.open("a") as stream:
                stream.write(json.dumps(run) + "\n")
            print(
                f"{method} seed {seed}: BLEU {run['bleu']:.1f}, ROUGE-L {run['rouge_l']:.1f}, {run['seconds']:.0f} s",
                file=sys.stderr,
                flush=True,
            )


if __name__ == "__main__":
    main()
