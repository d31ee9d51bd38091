"""Label words found by the model itself (LM-BFF, arXiv:2012.15723, section 5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import compose
from train.fewshot.job import Job
from train.fewshot.prompts.filled import prompt_dataset
from train.fewshot.prompts.template import Template
from train.fewshot.prompts.verbalizer import VerbalizerError, WordScores
from train.fewshot.reading.reader import MaskReader, inputs_of
from train.steps.evaluate import amp

__all__ = ["assignments", "candidate_words", "find_words", "scores_for"]


def candidate_words(logits: Tensor, labels: Tensor, allowed: Tensor, k: int = 100) -> list[list[int]]:
    """For each class its k words with the highest mean mask logit; logits (N, V), labels (N,), allowed (V,) bool."""
    words = []
    for c in range(int(labels.max()) + 1):
        mean = logits[labels == c].mean(0).masked_fill(~allowed, -torch.inf)
        words.append(mean.topk(min(k, int(allowed.sum()))).indices.tolist())
    return words


def assignments(logits: Tensor, labels: Tensor, words: Sequence[Sequence[int]], n: int = 100) -> list[tuple[int, ...]]:
    """The n assignments of one word a class with the highest zero-shot accuracy on the examples.

    A beam over classes: after class c an assignment is scored on the examples of classes 0..c. With up to three
    classes the beam holds every pair, so the search is exhaustive; 100^L pairs of more classes would be too many.
    Ties go to the higher total probability of the right words. No word serves two classes.
    """
    classes = len(words)
    width = 100 * 100 if classes <= 3 else 100
    beam: list[tuple[int, ...]] = [()]
    for c in range(classes):
        seen = labels <= c
        grown = [(*one, w) for one in beam for w in words[c] if w not in one]
        if not grown:
            raise VerbalizerError("there are fewer different candidate words than labels", hint="give words: --word")
        table = torch.tensor(grown)  # (A, c + 1)
        hits, sums = _score(logits[seen], labels[seen], table)
        order = torch.argsort(hits.double() + 1e-6 * torch.sigmoid(sums.double()), descending=True, stable=True)
        keep = width if c < classes - 1 else n
        beam = [grown[i] for i in order[:keep].tolist()]
    return beam


def _score(logits: Tensor, labels: Tensor, table: Tensor, chunk: int = 20_000) -> tuple[Tensor, Tensor]:
    hits, sums = [], []
    for part in torch.split(table, chunk):
        scores = logits[:, part]  # (N, A, C)
        hits.append((scores.argmax(-1) == labels[:, None]).sum(0))
        right = scores.log_softmax(-1).gather(2, labels[:, None, None].expand(-1, len(part), 1))
        sums.append(right[..., 0].mean(0))
    return torch.cat(hits), torch.cat(sums)


def word_starts(tokenizer: Any, size: int) -> Tensor:
    """(V,) tokens that are whole words of letters."""
    allowed = torch.zeros(size, dtype=torch.bool)
    spaced = any(token.startswith(("Ġ", "▁")) for token in tokenizer.get_vocab())
    for token, i in tokenizer.get_vocab().items():
        plain = token.lstrip("Ġ▁")
        starts = token != plain if spaced else not token.startswith("##")
        if i < size and starts and plain.isalpha() and len(plain) > 1:
            allowed[i] = True
    return allowed


@torch.no_grad()
def mask_logits(job: Job, template: str) -> Tensor:
    """(N, V) logits of the bare base at the examples' masks."""
    data = prompt_dataset(Template.parse(template), job.examples, job.tokenizer, job.labels, max_length=job.max_length)
    compose.activate(job.model, None)
    reader = MaskReader(job.model)
    rows_of: list[Tensor] = [torch.empty(0)] * len(data)
    try:
        reader.eval()
        for rows, batch in data.batches(32):
            with amp(job.model.device, job.precision):
                logits = reader(**inputs_of(batch)).logits[:, 0]
            for row, one in zip(rows.tolist(), logits.float(), strict=True):
                rows_of[row] = one
    finally:
        reader.close()
    return torch.stack(rows_of)


def find_words(job: Job, template: str, n: int = 1, k: int = 100) -> list[WordScores]:
    """The n best assignments for a template, by zero-shot accuracy on the examples."""
    logits = mask_logits(job, template)
    words = candidate_words(logits, job.answers, word_starts(job.tokenizer, logits.shape[1]), k)
    return [WordScores(tuple((w,) for w in one)) for one in assignments(logits, job.answers, words, n)]


def scores_for(job: Job) -> WordScores:
    """Words the user gave (each one token), else the labels' names, else those the model finds."""
    if job.words:
        return job.verbalizer().single(job.tokenizer)
    if job.spoken:
        return WordScores(job.spoken)
    return find_words(job, job.patterns[0])[0]
