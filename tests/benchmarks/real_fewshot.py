"""Few-shot methods side by side on real data: one command, one table.

    python tests/benchmarks/real_fewshot.py BASE DATA_DIR [--tasks sst2,rte] [--methods auto,setfit] [--seeds 13,21,42]
        [--test-rows 200] [--setfit-steps -1] [--out results.json]

BASE is a masked LM, DATA_DIR holds sst2/, ag_news/, rte/ and banking77/ (JSON Lines). K = 16 a class; every method sees
the same rows of a seed and is measured on the same test rows. Seconds are processor seconds of learning and of
predicting the test rows, so that a busy machine does not change them. Results are kept in `--out`: a run that was
stopped goes on, and the table is printed from what is there.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import warnings
from collections import Counter
from pathlib import Path

warnings.filterwarnings("ignore")

SST2 = ("{text} It was {mask}.", {"positive": "great", "negative": "terrible"})
NEWS = ("{mask} news: {text}", {"World": "world", "Sports": "sports", "Business": "business", "Sci/Tech": "technology"})
RTE = ("{text} ? {mask} , {text2}", {"entailment": "yes", "not_entailment": "no"})
TASKS = {  # training file, test file, columns, the written template and words
    "sst2": ("train_sentences.jsonl", "dev.jsonl", ("text", None), SST2),
    "ag_news": ("train.jsonl", "test.jsonl", ("text", None), NEWS),
    "rte": ("train.jsonl", "dev.jsonl", ("premise", "hypothesis"), RTE),
    "banking77": ("train.jsonl", "test.jsonl", ("text", None), None),
}
METHODS = (
    "majority",
    "zero-shot",
    "fine-tune",
    "feature",
    "setfit",
    "lm-bff",
    "lm-bff-auto-words",
    "lm-bff-demo",
    "pet",
    "pet-unlabeled",
    "ipet",
    "auto",
)
MANUAL = ("lm-bff", "lm-bff-demo")  # with the written words, as the papers'; the others use the labels' names
K = 16


def rows_of(folder: Path, task: str, part: int):
    from train.data.datasets import read_rows
    from train.fewshot.examples import Columns, to_examples

    file, (text, text2) = TASKS[task][part], TASKS[task][2]
    return to_examples(read_rows(folder / task / file), Columns(text, text2), source=task)


def one(base: str, folder: Path, task: str, method: str, seed: int, args) -> dict[str, float]:
    from train.fewshot.splits import k_shot

    split = k_shot(rows_of(folder, task, 0), K, seed, dev=False)
    test = rows_of(folder, task, 1)
    random.Random(0).shuffle(test)
    test = test[: args.test_rows]
    answers = [split.labels.index(e.label) for e in test]
    run = {"majority": majority, "setfit": setfit}.get(method, ours)
    guess, learn, predict = run(base, task, method, seed, split, test, args)
    hits = sum(int(g) == a for g, a in zip(guess, answers, strict=True))
    return {"accuracy": hits / len(test), "learn": learn, "predict": predict, "rows": len(test)}


def majority(base, task, method, seed, split, test, args):
    most = Counter(e.label for e in test).most_common(1)[0][0]
    return [split.labels.index(most)] * len(test), 0.0, 0.0


def ours(base, task, method, seed, split, test, args):
    import compose
    from train.fewshot.classifier.classifier import load_base
    from train.fewshot.job import Job, learn
    from train.fewshot.recipes.ipet import ipet
    from train.fewshot.recipes.pet import Recipe, pet

    manual = TASKS[task][3]
    facts = {"budget": args.budget, "seed": seed, "max_length": 128}
    if manual and method in MANUAL:
        facts |= {"templates": (manual[0],), "words": {label: (word,) for label, word in manual[1].items()}}
    if method == "lm-bff-auto-words":
        facts |= {"templates": (manual[0],) if manual else ()}
    if method in ("pet-unlabeled", "ipet"):
        random_rows = list(split.rest)
        random.Random(seed).shuffle(random_rows)
        facts["unlabeled"] = tuple(random_rows[: args.unlabeled])
    job = Job(base, load_base(base), compose.tokenizer(base), split.train, split.labels, **facts)
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
    guess = learned.classifier.logits(test).argmax(1).tolist()
    return guess, learn_seconds, time.process_time() - started


def setfit(base, task, method, seed, split, test, args):
    """SetFit on the same encoder with its own defaults (mean pooling, logistic head)."""
    import logging

    import torch
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, models
    from setfit import SetFitModel, Trainer, TrainingArguments
    from sklearn.linear_model import LogisticRegression

    logging.disable(logging.WARNING)
    text = lambda e: e.text if e.text2 is None else f"{e.text} [SEP] {e.text2}"  # noqa: E731
    torch.manual_seed(seed)
    body = models.Transformer(base, max_seq_length=128, model_args={"dtype": torch.float32})
    encoder = SentenceTransformer(modules=[body, models.Pooling(body.get_word_embedding_dimension())], device="cpu")
    model = SetFitModel(model_body=encoder, model_head=LogisticRegression(max_iter=1000))
    data = Dataset.from_list([{"text": text(e), "label": split.labels.index(e.label)} for e in split.train])
    options = {"report_to": "none", "save_strategy": "no", "output_dir": args.scratch}
    steps = {} if args.setfit_steps < 0 else {"max_steps": args.setfit_steps}
    started = time.process_time()
    Trainer(
        model=model, args=TrainingArguments(batch_size=16, seed=seed, **options, **steps), train_dataset=data
    ).train()
    learn_seconds = time.process_time() - started
    started = time.process_time()
    guess = model.predict([text(e) for e in test], as_numpy=True).tolist()
    return guess, learn_seconds, time.process_time() - started


def table(results: dict[str, dict[str, float]]) -> str:
    """Mean and sd over seeds of accuracy in percent, and mean processor seconds of learning."""
    cells: dict[tuple[str, str], list[dict[str, float]]] = {}
    for key, value in results.items():
        task, method, _seed = key.split("/")
        cells.setdefault((method, task), []).append(value)
    tasks = [t for t in TASKS if any(t == task for _, task in cells)]
    lines = ["| method | " + " | ".join(tasks) + " |", "|---|" + "---|" * len(tasks)]
    for method in METHODS:
        row = []
        for task in tasks:
            found = cells.get((method, task), [])
            if not found:
                row.append("")
                continue
            values = [100 * f["accuracy"] for f in found]
            sd = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            seconds = statistics.mean(f["learn"] for f in found)
            row.append(f"{statistics.mean(values):.1f}{sd} (n={len(values)}, {seconds:.0f} s)")
        if any(row):
            lines.append(f"| {method} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base")
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="13,21,42")
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--unlabeled", type=int, default=200)
    parser.add_argument("--generations", type=int, default=2, help="of iPET")
    parser.add_argument("--setfit-steps", type=int, default=-1, help="cap on SetFit's steps; -1: its own epoch")
    parser.add_argument("--budget", type=float, default=600.0)
    parser.add_argument("--out", type=Path, default=Path("real_fewshot.json"))
    parser.add_argument("--scratch", default="/tmp/real_fewshot")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for task in args.tasks.split(","):
        for seed in map(int, args.seeds.split(",")):
            for method in args.methods.split(","):
                key = f"{task}/{method}/{seed}"
                if key in results or (TASKS[task][3] is None and method in MANUAL):
                    continue
                results[key] = one(args.base, args.data, task, method, seed, args)
                args.out.write_text(json.dumps(results, indent=1))
                print(key, {name: round(value, 3) for name, value in results[key].items()}, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
