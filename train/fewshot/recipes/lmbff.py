"""LM-BFF (arXiv:2012.15723): prompt-based fine-tuning, with and without demonstrations; and plain fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import compose
from compose.base.text_config import fact
from train.fewshot.classifier.classifier import head_member
from train.fewshot.classifier.members import Demonstrations
from train.fewshot.job import FewShotResult, Job
from train.fewshot.prompts.filled import prompt_dataset
from train.fewshot.prompts.template import Template
from train.fewshot.prompts.verbalizer import WordScores
from train.fewshot.prompts.written_templates import templates
from train.fewshot.reading.head import Head, words_alone
from train.fewshot.reading.reader import MaskReader, PromptModel, mean_state
from train.fewshot.reading.views import View, view_dataset
from train.fewshot.recipes.label_words import scores_for
from train.fewshot.tuning.prompt_tuning import TunedAdapter, accuracy, scores_of, tune
from train.fewshot.tuning.refine import adapter_options
from train.loop import fit
from train.seeds import derive

__all__ = ["best_template", "fine_tune", "lm_bff", "lm_bff_demo", "written"]

_STEPS = 60
_DRAWS = 16  # of demonstrations for each training row
_SAMPLES = 16  # demonstrations averaged over at inference; 4 for pairs
_BLOCKS = 3
_BEAM = 100


def lm_bff(job: Job) -> FewShotResult:
    """Fine-tune on the template with the highest zero-shot accuracy on the dev rows, or else on the examples.

    The candidates are the job's patterns, or what its `writer` writes.
    """
    scores = scores_for(job)
    template = best_template(job, scores, written(job, scores) if job.writer else ())
    tuned = _tuned(job, template, scores)
    member = head_member([View(template, "mask")], words_alone(len(job.labels)), scores.ids)
    facts = _facts(job, template, scores)
    return FewShotResult(job.classifier(member), tuned.adapter, "lm-bff", tuned.config, tuned.result, facts)


def written(job: Job, scores: WordScores, most: int = 20) -> list[str]:
    """The templates a T5 writes for the examples and these label words, the most likely first."""
    writer = compose.load(str(job.writer), task="seq2seq", dtype="fp32")
    words = list(_facts(job, "", scores)["demonstrated_words"].values())
    tokenizer = compose.tokenizer(str(job.writer))
    beam = templates(writer, tokenizer, job.examples, words, job.labels, beam=_BEAM)
    job.say(f"{job.writer} wrote {len(beam)} templates; the best: {beam[0][0].format() if beam else 'none'}")
    return [template.format() for template, _ in beam[:most]]


def best_template(job: Job, scores: WordScores, candidates: Sequence[str] = ()) -> str:
    """The candidate (default: the job's patterns) whose zero-shot accuracy on dev rows, or the examples, is highest."""
    rows = job.dev or job.examples
    compose.activate(job.model, None)
    scored = []
    for template in candidates or job.patterns:
        data = prompt_dataset(Template.parse(template), rows, job.tokenizer, job.labels, max_length=job.max_length)
        logits = scores_of(job.model, scores, data, precision=job.precision)
        centred = logits - logits.mean(0)  # calibrated: a label that is merely frequent in text does not win by that
        scored.append((accuracy(centred, data), template))
    return max(scored, key=lambda pair: pair[0])[1]


def _tuned(job: Job, template: str, scores: WordScores) -> TunedAdapter:
    parsed = Template.parse(template)
    train = prompt_dataset(parsed, job.examples, job.tokenizer, job.labels, max_length=job.max_length)
    rows = job.dev
    dev = prompt_dataset(parsed, rows, job.tokenizer, job.labels, max_length=job.max_length) if rows else None
    config = job.config(job.steps(_STEPS, train, blocks=_BLOCKS), eval_every=20)
    options: dict[str, Any] = {"name": "fewshot", "dev": dev, "blocks": _BLOCKS}
    return tune(job.model, partial(PromptModel, scores=scores), train, config, **options)


def lm_bff_demo(job: Job) -> FewShotResult:
    """Fine-tune with demonstrations, each example in many draws, and read texts in the same way.

    The artifact holds the examples' texts: they are the demonstrations at prediction.
    """
    job.say("the artifact will hold the training texts: they are shown at prediction")
    scores = scores_for(job)
    template = best_template(job, scores)
    facts = _facts(job, template, scores)
    said = tuple(facts["demonstrated_words"].values())
    rows = tuple((e.text, e.text2, str(e.label)) for e in job.examples)
    samples = _SAMPLES if job.examples[0].text2 is None else _SAMPLES // 4
    shown = Demonstrations(template=template, words=scores.ids, said=said, rows=rows, samples=samples, seed=job.seed)
    data = shown.prompts(job.reading, job.examples, _DRAWS)
    options: dict[str, Any] = {"name": "fewshot", "blocks": _BLOCKS}
    config = job.config(job.steps(_STEPS, data, blocks=_BLOCKS))
    tuned = tune(job.model, partial(PromptModel, scores=scores), data, config, **options)
    return FewShotResult(job.classifier((shown, {})), tuned.adapter, "lm-bff-demo", tuned.config, tuned.result, facts)


class _HeadModel(nn.Module):
    """A linear head on the mean state: standard fine-tuning, whose head starts at random."""

    def __init__(self, reader: MaskReader, linear: nn.Linear) -> None:
        super().__init__()
        self.reader, self._linear = reader, (linear,)

    def forward(self, mask_at: Tensor, **inputs: Tensor) -> Any:
        """`.logits` (B, C)."""
        state = mean_state(self.reader(mask_at, **inputs, hidden=True).hidden, inputs["attention_mask"])
        return SimpleNamespace(logits=self._linear[0](state))


def fine_tune(job: Job) -> FewShotResult:
    """Standard fine-tuning: no prompt, a LoRA on every block and a new head on the mean state."""
    compose.activate(job.model, None)
    data = view_dataset(None, job.examples, job.tokenizer, job.labels, max_length=job.max_length)
    adapter = compose.create(job.model, "lora", adapter_options(job.model, 10_000), name="fewshot", seed=job.seed)
    compose.activate(job.model, "fewshot")
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(derive(job.seed, "init", "head"))
    linear = nn.Linear(int(fact(job.model.config, "hidden_size")), len(job.labels))
    torch.random.set_rng_state(torch_state)
    learner = nn.ModuleDict({"adapter": adapter, "head": linear})
    reader = MaskReader(job.model)
    config = job.config(job.steps(_STEPS, data, blocks=len(job.work.sizes)))
    try:
        result = fit(_HeadModel(reader, linear), learner, data, None, config)
    finally:
        reader.close()
    job.model.eval()
    head = Head((linear.weight.detach().T.clone(),), linear.bias.detach().clone(), 0.0)
    return FewShotResult(job.headed([View()], head), adapter.freeze(), "fine-tune", config, result, {})


def _facts(job: Job, template: str, scores: WordScores) -> dict[str, Any]:
    words = {lb: job.tokenizer.convert_ids_to_tokens(list(ids)) for lb, ids in zip(job.labels, scores.ids, strict=True)}
    plain = {lb: job.tokenizer.convert_tokens_to_string(tokens[:1]).strip() for lb, tokens in words.items()}
    return {"templates": [template], "label_words": words, "demonstrated_words": plain}
