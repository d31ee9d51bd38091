"""Few-shot methods and plain baselines side by side on real data: one command, one table.

    python tests/benchmarks/bench_few_shot.py BASE DATA_DIR [--tasks sst2,rte] [--methods auto,setfit] [--k 4,16,64]
        [--seeds 13,21,42] [--test-rows 400] [--setfit-steps -1] [--setfit-precision bf16] [--out results.jsonl]

BASE is a masked LM or a sentence encoder, DATA_DIR holds the tasks as JSON Lines. Every method sees the same K rows a
class of a seed and is measured on the same test rows. Seconds are processor seconds of learning and of predicting the
test rows, so that a busy machine changes them little; what everyone must load is left out. `ece` is the expected
calibration error in ten bins of equal width. Each finished cell is a line of `--out`: a run that was stopped goes on,
and the tables are printed from what is there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

warnings.filterwarnings("ignore")

SST2 = ("{text} It was {mask}.", {"positive": "great", "negative": "terrible"})
NEWS = ("{mask} news: {text}", {"World": "world", "Sports": "sports", "Business": "business", "Sci/Tech": "technology"})
RTE = ("{text} ? {mask} , {text2}", {"entailment": "yes", "not_entailment": "no"})
ONE, PAIR = ("text", None), ("premise", "hypothesis")
TASKS = {  # rows to learn from, rows to measure on (None: other rows of the same file), columns, template and words
    "sst2": ("sst2/train_sentences.jsonl", "sst2/dev.jsonl", ONE, SST2),
    "mr": ("mr/train.jsonl", "mr/test.jsonl", ONE, None),
    "ag_news": ("ag_news/train.jsonl", "ag_news/test.jsonl", ONE, NEWS),
    "cola": ("cola/train.jsonl", "cola/dev.jsonl", ONE, None),
    "books": ("multidomain_sentiment/books/train.jsonl", "multidomain_sentiment/books/test.jsonl", ONE, None),
    "dvd": ("multidomain_sentiment/dvd/train.jsonl", "multidomain_sentiment/dvd/test.jsonl", ONE, None),
    "banking77": ("banking77/train.jsonl", "banking77/test.jsonl", ONE, None),
    "rte": ("rte/train.jsonl", "rte/dev.jsonl", PAIR, RTE),
    "snli": ("snli/train_from_dev.jsonl", "snli/test_from_dev.jsonl", PAIR, None),
    "mnli": ("mnli/train_from_dev.jsonl", "mnli/test_from_dev.jsonl", PAIR, None),
    "boolq": ("superglue/BoolQ/val.jsonl", None, ("question", "passage"), None),
}
SINGLE = tuple(task for task, (_, _, columns, _) in TASKS.items() if columns[1] is None)
BASELINES = ("majority", "tf-idf", "frozen", "setfit")
METHODS = (
    *BASELINES,
    "auto",
    "feature",
    "zero-shot",
    "fine-tune",
    "lm-bff",
    "lm-bff-auto-words",
    "lm-bff-demo",
    "pet",
    "pet-unlabeled",
    "ipet",
)
MANUAL = ("lm-bff", "lm-bff-demo")  # with the written words, as the papers'; the others use the labels' names
MAX_LENGTH = 128


def rows_of(folder: Path, task: str) -> tuple[list, list]:
    """Rows to learn from and rows to measure on, the latter shuffled."""
    from train.data.datasets import read_rows
    from train.fewshot.examples import Columns, to_examples

    train_file, test_file, (text, text2), _ = TASKS[task]
    columns = Columns(text, text2)
    train = to_examples(read_rows(folder / train_file), columns, source=task)
    test = to_examples(read_rows(folder / test_file), columns, source=task) if test_file else []
    if not test:
        random.Random(1).shuffle(train)
        train, test = train[: len(train) // 2], train[len(train) // 2 :]
    random.Random(0).shuffle(test)
    return train, test


def one(task: str, method: str, k: int, seed: int, args) -> dict[str, float]:
    """A cell: accuracy, calibration error, processor seconds of learning and of predicting."""
    from train.fewshot.splits import k_shot

    train, test = rows_of(args.data, task)
    split = k_shot(train, k, seed, dev=False)
    test = test[: args.test_rows]
    answers = torch.tensor([split.labels.index(e.label) for e in test])
    run = {"majority": majority, "tf-idf": tf_idf, "frozen": frozen, "setfit": setfit}.get(method, ours)
    proba, learn, predict = run(task, method, seed, split, test, args)
    hits = (proba.argmax(1) == answers).double().mean()
    found = {"accuracy": float(hits), "ece": calibration_error(proba, answers), "learn": learn, "predict": predict}
    return {**found, "rows": len(test)}


def calibration_error(proba: torch.Tensor, answers: torch.Tensor, bins: int = 10) -> float:
    """sum_b n_b/N |accuracy_b - confidence_b| over bins of the largest probability."""
    sure, guess = proba.double().max(1)
    right = (guess == answers).double()
    which = (sure * bins).long().clamp(max=bins - 1)
    each = [(which == b) for b in range(bins)]
    return float(sum(m.double().mean() * (right[m].mean() - sure[m].mean()).abs() for m in each if bool(m.any())))


def majority(task, method, seed, split, test, args):
    """The commonest label of the test rows."""
    counts = Counter(e.label for e in test)
    return torch.tensor([[counts[label] / len(test) for label in split.labels]] * len(test)), 0.0, 0.0


def joined(examples) -> list[str]:
    """Texts; of a pair, both."""
    return [e.text if e.text2 is None else f"{e.text} [SEP] {e.text2}" for e in examples]


def tf_idf(task, method, seed, split, test, args):
    """scikit-learn's TfidfVectorizer (words and pairs of words) and LogisticRegression, defaults else."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(max_iter=1000, C=10)
    )
    return classified(model, joined(split.train), joined(test), split)


def frozen(task, method, seed, split, test, args):
    """LogisticRegression (C = 1, scikit-learn's default) on the unit mean states of the frozen encoder."""
    from sklearn.linear_model import LogisticRegression

    encoder = sentence_encoder(args.base)
    started = time.process_time()
    with precision(args.setfit_precision):
        train = encoder.encode(joined(split.train), normalize_embeddings=True)
    before = time.process_time() - started
    started = time.process_time()
    with precision(args.setfit_precision):
        asked = encoder.encode(joined(test), normalize_embeddings=True)
    after = time.process_time() - started
    proba, learn, predict = classified(LogisticRegression(max_iter=1000), train, asked, split)
    return proba, before + learn, after + predict


def classified(model, train, test, split):
    """(N, C) probabilities of a scikit-learn classifier, and its processor seconds."""
    started = time.process_time()
    model.fit(train, [split.labels.index(e.label) for e in split.train])
    learn = time.process_time() - started
    started = time.process_time()
    proba = torch.tensor(model.predict_proba(test))
    return proba, learn, time.process_time() - started


def ours(task, method, seed, split, test, args):
    """A method of `hub few-shot`."""
    import compose
    from train.fewshot.classifier.classifier import load_base
    from train.fewshot.job import Job, learn
    from train.fewshot.recipes.ipet import ipet
    from train.fewshot.recipes.pet import Recipe, pet

    manual = TASKS[task][3]
    facts = {"budget": args.budget, "seed": seed, "max_length": MAX_LENGTH}
    if manual and method in MANUAL:
        facts |= {"templates": (manual[0],), "words": {label: (word,) for label, word in manual[1].items()}}
    if method == "lm-bff-auto-words":
        facts |= {"templates": (manual[0],) if manual else ()}
    if method in ("pet-unlabeled", "ipet"):
        random_rows = list(split.rest)
        random.Random(seed).shuffle(random_rows)
        facts["unlabeled"] = tuple(random_rows[: args.unlabeled])
    job = Job(args.base, load_base(args.base), compose.tokenizer(args.base), split.train, split.labels, **facts)
    started = time.process_time()
    if method == "lm-bff-auto-words":
        job.__dict__["spoken"] = ()  # the labels' names stay unread: the model finds the words
    recipe = Recipe(steps=30, distil_steps=40)
    if method in ("pet", "pet-unlabeled"):
        learned = pet(job, recipe)
    elif method == "ipet":
        learned = ipet(job, recipe, generations=args.generations)
    else:
        learned = learn(job, {"lm-bff-auto-words": "lm-bff"}.get(method, method))
    learn_seconds = time.process_time() - started
    started = time.process_time()
    proba = learned.classifier.predict_proba(test)
    return proba, learn_seconds, time.process_time() - started


def sentence_encoder(base: str):
    """The encoder as sentence-transformers reads it: mean pooling over at most 128 tokens."""
    import logging

    from sentence_transformers import SentenceTransformer, models

    logging.disable(logging.WARNING)
    body = models.Transformer(base, max_seq_length=MAX_LENGTH, model_args={"dtype": torch.float32})
    return SentenceTransformer(modules=[body, models.Pooling(body.get_word_embedding_dimension())], device="cpu")


def precision(name: str):
    """Bf16 where asked for: what the methods of this project use where the processor multiplies it natively."""
    return torch.autocast("cpu", torch.bfloat16) if name == "bf16" else contextlib.nullcontext()


def setfit(task, method, seed, split, test, args):
    """SetFit on the same encoder with its own defaults (one epoch of its pairs, batches of 16, logistic head)."""
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments
    from sklearn.linear_model import LogisticRegression

    torch.manual_seed(seed)
    model = SetFitModel(model_body=sentence_encoder(args.base), model_head=LogisticRegression(max_iter=1000))
    rows = zip(joined(split.train), split.train, strict=True)
    data = Dataset.from_list([{"text": text, "label": split.labels.index(e.label)} for text, e in rows])
    options = {"report_to": "none", "save_strategy": "no", "output_dir": args.scratch, "show_progress_bar": False}
    counts = list(Counter(e.label for e in split.train).values())
    alike = sum(n * (n + 1) // 2 for n in counts)
    other = (sum(counts) ** 2 - sum(n * n for n in counts)) // 2
    epoch = -(-2 * max(alike, other) // 16)
    steps = {"max_steps": args.setfit_steps} if 0 <= args.setfit_steps < epoch else {}
    settings = TrainingArguments(batch_size=16, seed=seed, **options, **steps)
    started = time.process_time()
    with precision(args.setfit_precision):
        Trainer(model=model, args=settings, train_dataset=data).train()
    learn_seconds = time.process_time() - started
    started = time.process_time()
    with precision(args.setfit_precision):
        proba = torch.as_tensor(model.predict_proba(joined(test), as_numpy=True))
    return proba, learn_seconds, time.process_time() - started


def cell(found: list[dict[str, float]]) -> str:
    """Mean +- sd of accuracy in percent (seeds), calibration error, seconds of learning / of predicting 400 rows."""
    values = [100 * f["accuracy"] for f in found]
    sd = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    mean = {name: statistics.mean(f[name] for f in found) for name in ("ece", "learn")}
    predict = statistics.mean(f["predict"] / f["rows"] * 400 for f in found)
    many = "" if len(values) == 3 else f", n={len(values)}"
    return f"{statistics.mean(values):.1f}{sd} ({100 * mean['ece']:.0f}, {mean['learn']:.0f}/{predict:.1f} s{many})"


def tables(lines: list[dict]) -> str:
    """A table for each K, with the means over the tasks of one text and over the pairs that all its methods have."""
    shown = []
    for k in sorted({line["k"] for line in lines}):
        cells: dict[tuple[str, str], list[dict[str, float]]] = {}
        for line in lines:
            if line["k"] == k:
                cells.setdefault((line["method"], line["task"]), []).append(line)
        tasks = [t for t in TASKS if any(t == task for _, task in cells)]
        methods = [m for m in METHODS if any(m == method for method, _ in cells)]
        shown += [f"\nK = {k}\n", "| method | " + " | ".join(tasks) + " | mean, one text | mean, pairs |"]
        shown.append("|---|" + "---|" * (len(tasks) + 2))
        for method in methods:
            row = [cell(cells[method, t]) if (method, t) in cells else "" for t in tasks]
            for group in (SINGLE, tuple(set(TASKS) - set(SINGLE))):
                mine = [t for t in tasks if t in group]
                full = mine and all((method, t) in cells for t in mine)
                means = [statistics.mean(100 * f["accuracy"] for f in cells[method, t]) for t in mine] if full else []
                row.append(f"{statistics.mean(means):.1f}" if means else "")
            shown.append(f"| {method} | " + " | ".join(row) + " |")
    return "\n".join(shown)


def main() -> None:
    """Run the cells that are not there yet, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base")
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", default=",".join(SINGLE))
    parser.add_argument("--methods", default=",".join((*BASELINES, "auto")))
    parser.add_argument("--k", default="4,16,64")
    parser.add_argument("--seeds", default="13,21,42")
    parser.add_argument("--test-rows", type=int, default=400)
    parser.add_argument("--unlabeled", type=int, default=200)
    parser.add_argument("--generations", type=int, default=2, help="of iPET")
    parser.add_argument("--setfit-steps", type=int, default=-1, help="cap on SetFit's steps; -1: its own epoch")
    parser.add_argument("--setfit-precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--budget", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=Path("bench_few_shot.jsonl"))
    parser.add_argument("--scratch", default="/tmp/bench_few_shot")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    lines = [line for line in lines if line["base"] == args.base]
    done = {tuple(line[n] for n in ("task", "method", "k", "seed")) for line in lines}
    for k in map(int, args.k.split(",")):
        for seed in map(int, args.seeds.split(",")):
            for task in args.tasks.split(","):
                for method in args.methods.split(","):
                    if (task, method, k, seed) in done or (TASKS[task][3] is None and method in MANUAL):
                        continue
                    try:
                        found = one(task, method, k, seed, args)
                    except Exception as error:  # a task with fewer than K rows of a class; the others go on
                        print(task, method, k, seed, "left out:", str(error)[:120], flush=True)
                        continue
                    found |= {"base": args.base, "task": task, "method": method, "k": k, "seed": seed}
                    found |= {"setfit_steps": args.setfit_steps} if method == "setfit" else {}
                    lines.append(found)
                    with args.out.open("a") as file:
                        file.write(json.dumps(found) + "\n")
                    shown = {n: round(v, 3) for n, v in found.items() if isinstance(v, float)}
                    print(task, method, k, seed, shown, flush=True)
    print(tables(lines))


if __name__ == "__main__":
    main()
