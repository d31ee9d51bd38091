"""One few-shot task, and what a method makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

import compose
from compose.base.model import drawn_tensors
from compose.kind.adapter import Adapter
from hub.errors import UsageError, suggest
from hub.lazy import load
from train.config import TrainConfig
from train.data.batches import Dataset
from train.fewshot.classifier.classifier import FewShotClassifier, head_member
from train.fewshot.classifier.members import Member, Reading
from train.fewshot.classifier.spec import Spec
from train.fewshot.examples import Example
from train.fewshot.prompts.defaults import PAIR_TEMPLATES, TEMPLATES, name_words, spoken
from train.fewshot.prompts.verbalizer import Verbalizer
from train.fewshot.reading.head import Head
from train.fewshot.reading.views import Features, View
from train.fewshot.splits import stratified
from train.fewshot.work import Work
from train.result import FitResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["METHODS", "FewShotResult", "Job", "learn"]

METHODS: Mapping[str, str] = {
    "auto": "train.fewshot.recipes.auto:auto",
    "feature": "train.fewshot.recipes.auto:feature",
    "zero-shot": "train.fewshot.recipes.auto:zero_shot",
    "fine-tune": "train.fewshot.recipes.lmbff:fine_tune",
    "lm-bff": "train.fewshot.recipes.lmbff:lm_bff",
    "lm-bff-demo": "train.fewshot.recipes.lmbff:lm_bff_demo",
    "pet": "train.fewshot.recipes.pet:pet",
    "ipet": "train.fewshot.recipes.ipet:ipet",
    "multi-mask": "train.fewshot.recipes.multimask:multi_mask",
}


@dataclass
class Job:
    """A base, a few labelled examples, and limits.

    Attributes
    ----------
    templates, words
        What the user wrote; defaults fit most tasks, and labels speak for themselves.
    writer
        A T5 that writes templates for LM-BFF.
    folder
        Where PET and iPET keep the stages that are done, so that a run that was stopped goes on; None keeps none.
    budget
        Seconds that learning may take, loading left out: counted, not timed (see `work`).
    """

    base: str
    model: PreTrainedModel
    tokenizer: Any
    examples: tuple[Example, ...]
    labels: tuple[str, ...]
    dev: tuple[Example, ...] = ()
    unlabeled: tuple[Example, ...] = ()
    templates: tuple[str, ...] = ()
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)
    writer: str | None = None
    folder: Path | None = None
    seed: int = 13
    budget: float = 60.0
    max_length: int = 128
    say: Callable[[str], None] = lambda _text: None

    @property
    def masked(self) -> bool:
        """Whether the base fills masks: it has a mask, and a head that was learned, not drawn at random."""
        return self.encoder and not drawn_tensors(self.model)

    @property
    def encoder(self) -> bool:
        """Whether each token of the base sees those behind it."""
        return self.tokenizer.mask_token_id is not None and not getattr(self.model.config, "is_decoder", False)

    @cached_property
    def work(self) -> Work:
        """The budget, and what was spent of it."""
        return Work.of(self.model, self.budget, self.precision)

    @cached_property
    def precision(self) -> Literal["fp32", "bf16"]:
        """bf16 where the processor multiplies it natively (four times as fast there), else fp32."""
        native = self.model.device.type == "cuda" or _bf16_is_native()
        return "bf16" if native else "fp32"

    @property
    def left(self) -> float:
        """Seconds of the budget that are left, as they are counted."""
        return self.work.left

    def tokens(self, examples: Sequence[Example]) -> int:
        """Tokens of all these texts together, each as far as it is read."""
        texts = [f"{e.text} {e.text2 or ''}" for e in examples]
        return sum(min(len(ids), self.max_length) for ids in self.tokenizer(texts, verbose=False)["input_ids"])

    def steps(self, wanted: int, data: Dataset, *, blocks: int, batch: int = 16) -> int:
        """How many of the wanted steps on batches of some rows fit into what is left, charged to the budget."""
        each = self.work.step(batch * float(data.lengths.double().mean()), blocks)
        return self.work.steps(wanted, each, 0.8, name="steps", least=2)

    def budget_facts(self) -> dict[str, float]:
        """The budget, what was counted of it, and what was decided because of it."""
        return {"seconds": self.budget, "counted": round(self.work.spent, 1), **self.work.decided}

    @cached_property
    def answers(self) -> Tensor:
        """(N,) the labels of the examples."""
        return torch.tensor([self.labels.index(str(e.label)) for e in self.examples])

    @cached_property
    def patterns(self) -> tuple[str, ...]:
        """Templates in use; none where the base has no mask."""
        if not self.masked:
            return ()
        return self.templates or (TEMPLATES if self.examples[0].text2 is None else PAIR_TEMPLATES)

    @cached_property
    def spoken(self) -> tuple[tuple[int, ...], ...]:
        """Token ids that speak for each label; empty where nothing does."""
        return spoken(self.labels, self.tokenizer, dict(self.words)) if self.masked else ()

    def verbalizer(self) -> Verbalizer:
        """Words of each label: those given, else the last word of its name."""
        return Verbalizer.of({lb: list(self.words.get(lb, ())) or (name_words(lb) or [lb])[-1:] for lb in self.labels})

    def config(self, steps: int, *, lr: float = 1e-3, batch: int = 16, **more: Any) -> TrainConfig:
        """A run of `train.loop.fit`."""
        fixed: dict[str, Any] = {"base": self.base, "task": "classification", "seed": self.seed, "warmup": 0.1}
        fixed["precision"] = self.precision
        return TrainConfig(**{**fixed, "lr": lr, "duration": steps, "batch_size": batch, **more})

    @cached_property
    def reading(self) -> Reading:
        """How members read: this base, these labels; the adapter is `fewshot`."""
        return Reading(self.model, self.tokenizer, self.labels, self.max_length, self.precision)

    def features(self, views: Sequence[View], examples: Sequence[Example] | None = None) -> Features:
        """What the views see of the examples (default: all) under whatever is active."""
        return self.reading.features(views, self.spoken, self.examples if examples is None else examples)

    def classifier(
        self, *members: tuple[Member, Mapping[str, Tensor]], shares: Sequence[float] = (1.0,)
    ) -> FewShotClassifier:
        """A classifier of this task over the model as it is now."""
        spec = Spec(
            base=self.base,
            labels=self.labels,
            members=tuple(member for member, _ in members),
            shares=tuple(shares),
            max_length=self.max_length,
            base_task="masked_lm" if self.encoder else "causal_lm",
            precision=self.precision,
            columns=("text", None if self.examples[0].text2 is None else "text2"),
        )
        return FewShotClassifier(self.model, self.tokenizer, spec, [tensors for _, tensors in members])

    def headed(self, views: Sequence[View], head: Head, *, adapted: bool = True) -> FewShotClassifier:
        """A classifier of one head over views."""
        return self.classifier(head_member(views, head, self.spoken, adapted=adapted))

    def identity(self, name: str = "fewshot") -> Adapter:
        """An adapter that changes nothing: what a method stores that leaves the base as it is."""
        adapter = compose.create(self.model, "lora", {"r": 1, "lora_alpha": 1}, name=name, seed=self.seed)
        compose.activate(self.model, name)
        return adapter.freeze()


@dataclass(frozen=True)
class FewShotResult:
    """What a method ends in."""

    classifier: FewShotClassifier
    adapter: Adapter
    method: str
    config: TrainConfig
    result: FitResult
    facts: Mapping[str, Any]


def learn(job: Job, method: str) -> FewShotResult:
    """Run a method by name.

    Raises
    ------
    UsageError
        No such method (with the nearest), or one that needs a mask on a base that has none.
    """
    if method not in METHODS:
        near = suggest(method, METHODS)
        raise UsageError(f"there is no few-shot method {method!r}", hint=near or "methods: " + ", ".join(METHODS))
    if not job.masked and method not in ("auto", "feature"):
        lacks = "was saved without a language-modelling head" if job.encoder else "has none"
        raise UsageError(f"method {method} reads a mask, and {job.base} {lacks}", hint="--method auto, or a masked LM")
    learned: FewShotResult = load(METHODS[method])(within_budget(job))
    return learned


def within_budget(job: Job) -> Job:
    """The job with as many examples as half of the budget reads, two a label at least; the labels keep their shares."""
    views = 1 + len(job.patterns)
    each = job.work.reading(views * job.tokens(job.examples) / len(job.examples))
    most = max(int(job.budget / 2 / each), 2 * len(job.labels))
    if most < len(job.examples):
        job.say(f"the budget has room for {most} of {len(job.examples)} rows")
        job = replace(job, examples=tuple(stratified(job.examples, job.seed)[:most]))
        job.work.decided["rows"] = most
    job.work.charge(each * len(job.examples))
    return job


def _bf16_is_native() -> bool:
    """Whether this processor has AVX512-BF16 or AMX; on others bf16 is emulated and slow."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
