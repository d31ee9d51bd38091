"""DEMix on real text: experts of many domains on the built-in base, and domains that no expert has seen.

    python tests/benchmarks/real_domains.py DATA_DIR [--known a,b] [--novel c] [--steps 40] [--keep DIR] [--json FILE|-]

DATA_DIR holds a folder for each domain with train.jsonl, valid.jsonl and test.jsonl, rows {"text": ...}. One LoRA is
trained for each known domain, and one more, of four times their rank, on the union of their texts for as many tokens as
all of them together (``dense``). The table gives perplexity on test texts (their first tokens) of

base      the bare base
dense     the one adapter of the union
average   the experts' effects averaged
uniform   their output probabilities averaged
demix     the mixture by the Bayes posterior (gamma 1, uniform prior)
hedged    the mixture by hedged weights (uniform prior)
cached    demix with DEMix's prior, the moving average of posteriors over texts of valid.jsonl
fitted    hedged with a prior fitted on texts of valid.jsonl
oracle    the domain's own expert; for a novel domain the best one in hindsight

With ``--keep`` what the models said of the texts is kept, and a second run only mixes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from bench_tools import machine, report
from safetensors.torch import load_file, save_file
from torch import Tensor

import compose
from router.bench import Batch
from router.ensemble.demix import EnsembleScore, mix
from router.ensemble.experts import expert_log_probs
from router.ensemble.posterior import fitted, log_prior, moving_average
from train.config import TrainConfig
from train.data.datasets import text_blocks
from train.loop import fit

BASE = "builtin:tiny-lm"
NOVEL = "brown_editorial,brown_romance,political_speeches,web_overheard"
WAYS = ("base", "dense", "average", "uniform", "demix", "hedged", "cached", "fitted", "oracle")
OTHERS = ("base", "dense", "average")
Said = dict[str, Tensor]  # log probabilities of the experts (E, B, T-1) and the others (B, T-1), and valid (B, T-1)


def main(argv: list[str] | None = None) -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--known", help="domains with an expert [all that are not novel]")
    parser.add_argument("--novel", default=NOVEL, help="domains without an expert")
    parser.add_argument("--steps", type=int, default=40, help="steps of 4 x 256 tokens for each expert")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--texts", type=int, default=12, help="test texts of each domain")
    parser.add_argument("--dev", type=int, default=8, help="texts of valid.jsonl for the priors")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a directory for what the models say of the texts")
    parser.add_argument("--json", metavar="FILE|-")
    options = parser.parse_args(argv)
    started = time.process_time()
    novel = [name for name in options.novel.split(",") if name]
    domains = sorted(path.name for path in options.data.iterdir() if (path / "train.jsonl").exists())
    known = options.known.split(",") if options.known else [name for name in domains if name not in novel]
    if absent := {*known, *novel} - set(domains):
        raise SystemExit(f"{options.data} has no {', '.join(sorted(absent))}")
    study = Study(options, known)
    rows = [study.measure(name, novel) for name in [*known, *novel]]
    rows += [averaged("mean, known", rows[: len(known)]), averaged("mean, novel", rows[len(known) :])]
    left_out = ("data", "keep", "json")
    found = {
        "machine": machine(),
        "model": {key: value for key, value in vars(options).items() if key not in left_out} | {"known": known},
        "cpu_seconds": time.process_time() - started,
        "worst_regret": study.worst_regret,
        "worst_hedge": study.worst_hedge,
        "rows": rows,
    }
    report(found, ("domain", *WAYS, "weight"), options.json, sys.stdout)


def texts(path: Path) -> list[str]:
    """Texts of a JSONL file."""
    return [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines() if line.strip()]


class Study:
    """One base with all adapters on it, trained when they are first asked.

    Attributes
    ----------
    worst_regret : most that demix lost to an expert beyond ln(1 / prior), in nats a text: not above 0.
    worst_hedge : most that hedged lost to the better of demix and uniform, in nats a text: not above ln 5.
    """

    def __init__(self, options: argparse.Namespace, known: list[str]) -> None:
        self.options, self.known = options, known
        self.worst_regret = self.worst_hedge = -math.inf
        self.trained = False

    def prepare(self) -> None:
        """Train the experts and the dense adapter."""
        self.model, self.tokenizer = compose.load(BASE, dtype="fp32"), compose.tokenizer(BASE)
        steps, rank, union = self.options.steps, self.options.rank, []
        for name in self.known:
            rows = texts(self.options.data / name / "train.jsonl")
            union += rows
            self.train(name, rows, steps, rank, 5e-3)
        self.train("dense", union, steps * len(self.known), 4 * rank, 2e-3)
        self.trained = True

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

    def said(self, domain: str, split: str, most: int) -> Said:
        """What experts and the others say of the first texts of a file."""
        kept = self.options.keep and self.options.keep / f"{domain}.{split}.safetensors"
        if kept and kept.exists():
            return load_file(kept)
        if not self.trained:
            self.prepare()
        rows = [self._ids(text) for text in texts(self.options.data / domain / f"{split}.jsonl")]
        batch = Batch.of([torch.tensor(row) for row in rows if len(row) > 1][:most], pad=1)
        even = " + ".join(f"{1 / len(self.known)} * {name}" for name in self.known)
        ids, mask = batch.input_ids, batch.attention_mask
        experts, valid = expert_log_probs(self.model, self.known, ids, mask)
        found = {"experts": experts, "valid": valid}
        if split == "test":
            for name, other in zip(OTHERS, (None, "dense", even), strict=True):
                found[name] = expert_log_probs(self.model, [other], ids, mask)[0][0]
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in found.items()}, kept)
        return found

    def measure(self, domain: str, novel: list[str]) -> dict[str, Any]:
        """Perplexities of one domain."""
        test = self.said(domain, "test", self.options.texts)
        dev = self.said(domain, "valid", self.options.dev)
        demix = mix(test["experts"], test["valid"], log_prior=log_prior(None, len(self.known)))
        uniform, hedged = demix.reweighed(temperature=math.inf), demix.reweighed(hedge=True)
        held = fitted(dev["experts"][:, dev["valid"]].T).exp()
        self.worst_regret = max(self.worst_regret, float(demix.regret.max()))
        best = torch.minimum(demix.nll, uniform.nll)
        self.worst_hedge = max(self.worst_hedge, float((hedged.nll - best).max()))
        tokens = float(test["valid"].sum())

        def perplexity(nll: Tensor) -> float:
            return math.exp(float(nll.sum()) / tokens)

        own = [perplexity(nll) for nll in demix.expert_nll]
        return {
            "domain": domain,
            **{way: perplexity(-test[way].double()) for way in OTHERS},
            "uniform": perplexity(uniform.nll),
            "demix": perplexity(demix.nll),
            "hedged": perplexity(hedged.nll),
            "cached": perplexity(demix.reweighed(prior=cached(dev)).nll),
            "fitted": perplexity(hedged.reweighed(prior=held).nll),
            "oracle": min(own) if domain in novel else own[self.known.index(domain)],
            "weight": self._weight(hedged, domain, novel),
            "best_expert": self.known[own.index(min(own))],
        }

    def _weight(self, score: EnsembleScore, domain: str, novel: list[str]) -> str:
        """How much the domain's own expert weighs at the end of a text; for a novel one, which expert weighs most."""
        final = score.final.mean(0)
        if domain in novel:
            return f"{float(final.max()):.2f} {self.known[int(final.argmax())]}"
        return f"{float(final[self.known.index(domain)]):.2f}"

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, truncation=True, max_length=self.options.tokens).input_ids)


def cached(dev: Said) -> Tensor:
    """DEMix's prior (E,) from development texts: the moving average of their last posteriors."""
    prior = log_prior(None, len(dev["experts"]))
    for row in range(dev["experts"].shape[1]):
        score = mix(dev["experts"][:, row : row + 1], dev["valid"][row : row + 1], log_prior=prior)
        prior = moving_average(prior, score.final[0])
    return prior.exp()


def averaged(label: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric mean of the perplexities."""
    if not rows:
        return {"domain": label, **dict.fromkeys(WAYS, math.nan), "weight": ""}
    return {"domain": label, **{way: math.exp(mean(math.log(row[way]) for row in rows)) for way in WAYS}, "weight": ""}


if __name__ == "__main__":
    main()
