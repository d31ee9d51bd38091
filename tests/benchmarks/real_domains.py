"""DEMix on real text: experts of many domains on the built-in base, and domains that no expert has seen.

    python tests/benchmarks/real_domains.py DATA_DIR [--known a,b] [--novel c] [--steps 100] [--json FILE|-]

DATA_DIR holds a folder for each domain with train.jsonl and test.jsonl, rows {"text": ...}. One LoRA is trained for
each known domain, and one more, of four times their rank, on the union of their texts for as many tokens as
all of them together (``dense``). The table gives perplexity on test texts (their first tokens) of

base      the bare base
dense     the one adapter of the union
average   the experts' effects averaged
uniform   their output probabilities averaged
top1      the expert with the highest posterior at each token
demix     the mixture by the Bayes posterior (gamma 1, uniform prior)
oracle    the domain's own expert; for a novel domain the best one in hindsight
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_tools import machine, report
from torch import Tensor

import compose
from router.bench import Batch
from router.ensemble import EnsembleScore, mix
from router.fold import expert_log_probs
from router.posterior import log_prior
from train.config import TrainConfig
from train.data import text_blocks
from train.loop import fit

BASE = "builtin:tiny-lm"
NOVEL = "brown_editorial,brown_romance,political_speeches,web_overheard"
WAYS = ("base", "dense", "average", "uniform", "top1", "demix", "oracle")


def main(argv: list[str] | None = None) -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--known", help="domains with an expert [all that are not novel]")
    parser.add_argument("--novel", default=NOVEL, help="domains without an expert")
    parser.add_argument("--steps", type=int, default=100, help="steps of 4 x 256 tokens for each expert")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--texts", type=int, default=16, help="test texts of each domain")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of each test text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE|-")
    options = parser.parse_args(argv)
    started = time.process_time()
    novel = [name for name in options.novel.split(",") if name]
    domains = sorted(path.name for path in options.data.iterdir() if (path / "train.jsonl").exists())
    known = options.known.split(",") if options.known else [name for name in domains if name not in novel]
    if absent := {*known, *novel} - set(domains):
        raise SystemExit(f"{options.data} has no {', '.join(sorted(absent))}")
    study = Study(options)
    for name in known:
        study.train(name, texts(options.data / name / "train.jsonl"), options.steps, options.rank, 5e-3)
    union = [text for name in known for text in texts(options.data / name / "train.jsonl")]
    study.train("dense", union, options.steps * len(known), 4 * options.rank, 2e-3)
    rows = [study.measure(name, known, novel) for name in [*known, *novel]]
    rows += [mean("mean, known", rows[: len(known)]), mean("mean, novel", rows[len(known) :])]
    found = {
        "machine": machine(),
        "model": {**vars(options), "data": options.data.name},
        "cpu_seconds": time.process_time() - started,
        "worst_regret": study.worst_regret,
        "rows": rows,
    }
    report(found, ("domain", *WAYS, "weight"), options.json, sys.stdout)


def texts(path: Path) -> list[str]:
    """Texts of a JSONL file."""
    return [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines() if line.strip()]


class Study:
    """One base with all adapters on it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model = compose.load(BASE, dtype="fp32")
        self.tokenizer = compose.tokenizer(BASE)
        self.worst_regret = -math.inf

    def train(self, name: str, rows: list[str], steps: int, rank: int, lr: float) -> None:
        """Train an adapter called `name` for so many steps."""
        wanted = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
        config = TrainConfig(
            base=BASE,
            options=wanted,
            batch_size=4,
            duration=steps,
            lr=lr,
            warmup=0.1,
            eval_every=0,
            seed=self.options.seed,
        )
        adapter = compose.create(self.model, "lora", wanted, name=name, seed=self.options.seed)
        compose.activate(self.model, name)
        blocks = text_blocks(self.tokenizer, rows, config.max_length, source=name)
        result = fit(self.model, adapter, blocks, None, config)
        adapter.freeze()
        compose.activate(self.model, None)
        print(f"{name}: {result.steps} steps, {result.seconds:.0f} s", file=sys.stderr, flush=True)

    def measure(self, domain: str, known: list[str], novel: list[str]) -> dict[str, Any]:
        """Perplexities of one domain."""
        rows = [torch.tensor(self._ids(text)) for text in texts(self.options.data / domain / "test.jsonl")]
        batch = Batch.of([row for row in rows if len(row) > 1][: self.options.texts], pad=1)
        even = " + ".join(f"{1 / len(known)} * {name}" for name in known)
        ids, mask = batch.input_ids, batch.attention_mask
        log_probs, valid = expert_log_probs(self.model, known, ids, mask)
        others = [expert_log_probs(self.model, [other], ids, mask)[0][0] for other in (None, "dense", even)]
        score = mix(log_probs, valid, log_prior=log_prior(None, len(known)))
        self.worst_regret = max(self.worst_regret, float(score.regret.max()))
        tokens = float(valid.sum())

        def perplexity(nll: Tensor) -> float:
            return math.exp(float(nll.sum()) / tokens)

        own = [perplexity(nll) for nll in score.expert_nll]
        return {
            "domain": domain,
            **{way: perplexity(-p.double()) for way, p in zip(("base", "dense", "average"), others, strict=True)},
            "uniform": perplexity(score.reweighed(temperature=math.inf).nll),
            "top1": perplexity(self._top1(score)),
            "demix": perplexity(score.nll),
            "oracle": min(own) if domain in novel else own[known.index(domain)],
            "weight": self._weight(score, known, domain, novel),
            "best_expert": known[own.index(min(own))],
        }

    @staticmethod
    def _top1(score: EnsembleScore) -> Tensor:
        best = score.posterior.argmax(-1)  # (B, T-1)
        chosen = score.expert_log_probs.permute(1, 2, 0).gather(-1, best[..., None])[..., 0]
        return -chosen.double().masked_fill(~score.valid, 0.0)

    @staticmethod
    def _weight(score: EnsembleScore, known: list[str], domain: str, novel: list[str]) -> str:
        """How much the domain's own expert weighs at the end of a text; for a novel one, which expert weighs most."""
        final = score.final.mean(0)
        if domain in novel:
            return f"{float(final.max()):.2f} {known[int(final.argmax())]}"
        return f"{float(final[known.index(domain)]):.2f}"

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, truncation=True, max_length=self.options.tokens).input_ids)


def mean(label: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric mean of the perplexities."""
    if not rows:
        return {"domain": label, **dict.fromkeys(WAYS, math.nan), "weight": ""}
    means = {way: math.exp(sum(math.log(row[way]) for row in rows) / len(rows)) for way in WAYS}
    return {"domain": label, **means, "weight": ""}


if __name__ == "__main__":
    main()
