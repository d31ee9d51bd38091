"""LM-BFF (arXiv:2012.15723): prompt-based fine-tuning, with and without demonstrations; and plain fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import compose
from train.fewshot.demonstrations import demonstrated
from train.fewshot.generate import templates
from train.fewshot.head import Head, words_alone
from train.fewshot.job import Job, Learned
from train.fewshot.prompts import prompt_dataset
from train.fewshot.reader import MaskReader, mean_state
from train.fewshot.refine import adapter_options
from train.fewshot.template import Template
from train.fewshot.tuning import Tuned, accuracy, scores_of, tune
from train.fewshot.verbalizer import WordScores
from train.fewshot.views import View, view_dataset
from train.fewshot.words import scores_for
from train.loop import fit
from train.seeds import derive, generator

__all__ = ["best_template", "demonstrated_logits", "ensemble_logits", "fine_tune", "lm_bff", "lm_bff_demo", "written"]

_STEPS = 60
_SAMPLES = 16  # demonstrations averaged over at inference; 4 for pairs
_BLOCKS = 3
_BEAM = 100


def lm_bff(job: Job) -> Learned:
    """Fine-tune on the template with the highest zero-shot accuracy on the dev rows, or else on the examples.

    The candidates are the job's patterns, or what its `writer` writes.
    """
    scores = scores_for(job)
    template = best_template(job, scores, written(job, scores) if job.writer else ())
    tuned, config = _tuned(job, template, scores, "fewshot")
    classifier = job.classifier([View(template, "mask")], words_alone(len(job.labels)), scores.ids)
    facts = _facts(job, template, scores)
    return Learned(classifier, tuned.adapter, "lm-bff", config, tuned.result, facts)


def written(job: Job, scores: WordScores, most: int = 20) -> list[str]:
    """The templates a T5 writes for the examples and these label words, the most likely first."""
    writer = compose.load(str(job.writer), task="seq2seq", dtype="fp32")
    words = list(_facts(job, "", scores)["demonstrated_words"].values())
    tokenizer = compose.tokenizer(str(job.writer))
    found = templates(writer, tokenizer, job.examples, words, job.labels, beam=_BEAM)
    job.say(f"{job.writer} wrote {len(found)} templates; the best: {found[0][0].format() if found else 'none'}")
    return [template.format() for template, _ in found[:most]]


def best_template(job: Job, scores: WordScores, candidates: Sequence[str] = ()) -> str:
    """The candidate (default: the job's patterns) whose zero-shot accuracy on dev rows, or the examples, is highest."""
    rows = job.dev or job.examples
    compose.activate(job.model, None)
    found = []
    for template in candidates or job.patterns:
        data = prompt_dataset(Template.parse(template), rows, job.tokenizer, job.labels, max_length=job.max_length)
        logits = scores_of(job.model, scores, data, precision=job.precision)
        centred = logits - logits.mean(0)  # calibrated: a label that is merely frequent in text does not win by that
        found.append((accuracy(centred, data), template))
    return max(found, key=lambda pair: pair[0])[1]


def _tuned(job: Job, template: str, scores: WordScores, name: str, **more: Any) -> tuple[Tuned, Any]:
    parsed = Template.parse(template)
    train = prompt_dataset(parsed, job.examples, job.tokenizer, job.labels, max_length=job.max_length)
    rows = job.dev
    dev = prompt_dataset(parsed, rows, job.tokenizer, job.labels, max_length=job.max_length) if rows else None
    config = job.config(_STEPS, eval_every=20, **more)
    tuned = tune(job.model, scores, train, config, name=name, dev=dev, blocks=_BLOCKS, seconds=job.left * 0.8)
    return tuned, config


def ensemble_logits(job: Job, templates: Sequence[str], scores: WordScores, test: Sequence[Any]) -> Tensor:
    """(N, C) mean logits of one fine-tuned adapter a template."""
    total = torch.zeros(len(test), len(job.labels))
    for i, template in enumerate(templates):
        name = f"member{i}"
        _tuned(job, template, scores, name)
        data = prompt_dataset(Template.parse(template), test, job.tokenizer, job.labels, max_length=job.max_length)
        total += scores_of(job.model, scores, data, precision=job.precision) / len(templates)
        compose.activate(job.model, None)
        compose.detach(job.model, name)
    return total


def lm_bff_demo(job: Job) -> Learned:
    """Fine-tune with demonstrations, each example in many draws.

    The published classifier reads the template without demonstrations (its artifact holds no training text);
    `demonstrated_logits` averages over them.
    """
    scores = scores_for(job)
    template = best_template(job, scores)
    words = _facts(job, template, scores)["demonstrated_words"]
    draws = _draws(job)
    data = draws(template, job.examples, words, 16, "train")
    config = job.config(_STEPS)
    tuned = tune(job.model, scores, data, config, name="fewshot", blocks=_BLOCKS, seconds=job.left * 0.8)
    classifier = job.classifier([View(template, "mask")], words_alone(len(job.labels)), scores.ids)
    facts = _facts(job, template, scores)
    return Learned(classifier, tuned.adapter, "lm-bff-demo", config, tuned.result, facts)


def demonstrated_logits(job: Job, learned: Learned, test: Sequence[Any]) -> Tensor:
    """(N, C) logits of a classifier of `lm_bff_demo`, averaged over 16 draws of demonstrations (4 for pairs)."""
    template = learned.classifier.views[0].template or ""
    scores = WordScores(learned.classifier.spec.words)
    words = learned.facts["demonstrated_words"]
    samples = _SAMPLES if job.examples[0].text2 is None else _SAMPLES // 4
    data = _draws(job)(template, test, words, samples, "test")
    return scores_of(job.model, scores, data, precision=job.precision).view(len(test), samples, -1).mean(1)


def _draws(job: Job) -> Any:
    """A function that puts demonstrations to queries, filtered by the bare base's sentence embeddings."""
    plain = job.classifier([View()], words=())
    compose.activate(job.model, None)
    pool = plain.features(job.examples).states[0]
    active = "fewshot" if "fewshot" in job.model.moduloom.adapters else None

    def draw(template: str, queries: Sequence[Any], words: dict[str, str], samples: int, part: str) -> Any:
        compose.activate(job.model, None)
        likeness = plain.features(queries).states[0] @ pool.T
        compose.activate(job.model, active)
        random = generator(job.seed, "demonstrations", part)
        options: dict[str, Any] = {"samples": samples, "random": random, "likeness": likeness}
        parsed, rows = Template.parse(template), list(job.examples)
        return demonstrated(
            parsed, queries, rows, words, job.tokenizer, job.labels, max_length=2 * job.max_length, **options
        )

    return draw


class _HeadModel(nn.Module):
    """A linear head on the mean state: standard fine-tuning, whose head starts at random."""

    def __init__(self, reader: MaskReader, linear: nn.Linear) -> None:
        super().__init__()
        self.reader, self._linear = reader, (linear,)

    def forward(self, mask_at: Tensor, **inputs: Tensor) -> Any:
        """`.logits` (B, C)."""
        state = mean_state(self.reader(mask_at, **inputs, hidden=True).hidden, inputs["attention_mask"])
        return SimpleNamespace(logits=self._linear[0](state))


def fine_tune(job: Job) -> Learned:
    """Standard fine-tuning: no prompt, a LoRA on every block and a new head on the mean state."""
    compose.activate(job.model, None)
    data = view_dataset(None, job.examples, job.tokenizer, job.labels, max_length=job.max_length)
    adapter = compose.create(job.model, "lora", adapter_options(job.model, 10_000), name="fewshot", seed=job.seed)
    compose.activate(job.model, "fewshot")
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(derive(job.seed, "init", "head"))
    linear = nn.Linear(int(job.model.config.hidden_size), len(job.labels))
    torch.random.set_rng_state(torch_state)
    learner = nn.ModuleDict({"adapter": adapter, "head": linear})
    reader = MaskReader(job.model)
    config = job.config(_STEPS)
    try:
        result = fit(_HeadModel(reader, linear), learner, data, None, config, seconds=job.left * 0.8)
    finally:
        reader.close()
    job.model.eval()
    head = Head((linear.weight.detach().T.clone(),), linear.bias.detach().clone(), 0.0)
    classifier = job.classifier([View()], head, words=())
    return Learned(classifier, adapter.freeze(), "fine-tune", config, result, {})


def _facts(job: Job, template: str, scores: WordScores) -> dict[str, Any]:
    words = {lb: job.tokenizer.convert_ids_to_tokens(list(ids)) for lb, ids in zip(job.labels, scores.ids, strict=True)}
    plain = {lb: job.tokenizer.convert_tokens_to_string(tokens[:1]).strip() for lb, tokens in words.items()}
    return {"templates": [template], "label_words": words, "demonstrated_words": plain}
