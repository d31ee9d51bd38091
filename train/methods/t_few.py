"""T-Few's losses for (IA)^3."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from compose.kind.adapter import Adapter
from train.data.batches import IGNORE
from train.errors import ConfigError, DataError
from train.method import Method, MethodOptions, register


class TFewOptions(MethodOptions):
    """The answers to choose among."""

    choices: tuple[str, ...] = Field((), description="every completion that the data have, such as [' yes', ' no']")


@register("t_few")
class TFew(Method):
    """(IA)^3 with three losses over the answers y_1..y_K of a prompt, y the right one. Stores the gains.

    `L_LM = -1/|y| sum_t log p(y_t)`, `L_UL = -sum_{k wrong} sum_t log(1 - p(y_kt)) / sum_{k wrong} |y_k|` and
    `L_LN = -log softmax_k(b)_y` with `b_k = 1/|y_k| sum_t log p(y_kt)`, added up; a row counts by the tokens of its
    answer.
    """

    kind = "ia3"
    paper = "arXiv:2205.05638"
    Options = TFewOptions
    own: TFewOptions

    def prepare(self, model: PreTrainedModel, adapter: Adapter, tokenizer: Any) -> None:
        """The answers' tokens."""
        self._answers: list[list[int]] = []
        if not self.own.choices:
            return
        if len(set(self.own.choices)) < 2 or tokenizer is None:
            hint = "options.choices=[' yes', ' no']"
            raise ConfigError("t_few chooses among two or more different answers", hint=hint)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        encoded = tokenizer(list(self.own.choices), add_special_tokens=False)["input_ids"]
        self._answers = [[*ids, *end] for ids in encoded]

    def inputs(self, batch: dict[str, Tensor], task: str) -> dict[str, Tensor]:
        """Every prompt with every answer: B K rows; without answers to choose among, the rows."""
        return _expand(batch, self._answers, task) if self._chooses(task) else batch

    def objective(self, logits: Tensor, batch: dict[str, Tensor], task: str) -> Tensor:
        """Without answers to choose among, the loss of the task."""
        if not self._chooses(task):
            return super().objective(logits, batch, task)
        right = self._which(batch["labels"])  # (B,)
        token, wrong, lengths = self._all_answers(logits, batch, task)  # (B, K, T), (B, K, T), (K,)
        score = token.sum(-1)  # (B, K) log p of each answer
        others = F.one_hot(right, len(lengths)) == 0  # (B, K)
        own = lengths[right]  # (B,) tokens of the right answer
        unlikely = -(wrong.sum(-1) * others).sum(-1) / (lengths * others).sum(-1)
        ranked = F.cross_entropy(score / lengths, right, reduction="none")
        return (-score.gather(1, right[:, None])[:, 0] + own * (unlikely + ranked)).sum()

    def _chooses(self, task: str) -> bool:
        return bool(self._answers) and task in ("causal_lm", "seq2seq")

    def _which(self, labels: Tensor) -> Tensor:
        """(B,) which answer each row has."""
        rows = [[token for token in row if token != IGNORE] for row in labels.tolist()]
        try:
            return torch.tensor([self._answers.index(row) for row in rows], device=labels.device)
        except ValueError:
            raise DataError(
                "a row's completion is none of the choices", hint="list every completion in options.choices, as it is"
            ) from None

    def _all_answers(self, logits: Tensor, batch: dict[str, Tensor], task: str) -> tuple[Tensor, Tensor, Tensor]:
        """Log p and log(1 - p) of every token of every answer to every prompt, zero where an answer has ended."""
        device = batch["labels"].device
        lengths = torch.tensor([len(answer) for answer in self._answers], device=device)
        target = self.inputs(batch, task)["labels"]
        if task == "causal_lm":
            target = F.pad(target[:, 1:], (0, 1), value=IGNORE)
        learned = target != IGNORE
        log_token = F.log_softmax(logits[learned].float(), -1).gather(1, target[learned][:, None])[:, 0]
        not_found = torch.log1p(-log_token.exp().clamp(max=1 - 1e-6))
        blank = torch.zeros(target.shape, device=device)
        log_p, log_not = blank.masked_scatter(learned, log_token), blank.masked_scatter(learned, not_found)
        whole = (len(batch["labels"]), len(lengths), -1)
        return log_p.view(whole), log_not.view(whole), lengths


def _expand(batch: dict[str, Tensor], answers: list[list[int]], task: str) -> dict[str, Tensor]:
    """Every prompt with every answer: B K rows."""
    rows, count, device = len(batch["labels"]), len(answers), batch["labels"].device
    if task == "seq2seq":
        longest = max(len(answer) for answer in answers)
        labels = torch.tensor([a + [IGNORE] * (longest - len(a)) for a in answers], device=device)
        same = {n: v.repeat_interleave(count, 0) for n, v in batch.items() if n != "labels"}
        return {**same, "labels": labels.repeat(rows, 1)}
    prompts = [
        ids[(mask == 1) & (labels == IGNORE)].tolist()
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]
    pairs = [(prompt, answer) for prompt in prompts for answer in answers]
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)

    def lay(parts: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([part + [fill] * (longest - len(part)) for part in parts], device=device)

    return {
        "input_ids": lay([prompt + answer for prompt, answer in pairs], 0),
        "attention_mask": lay([[1] * (len(prompt) + len(answer)) for prompt, answer in pairs], 0),
        "labels": lay([[IGNORE] * len(prompt) + answer for prompt, answer in pairs], IGNORE),
    }
