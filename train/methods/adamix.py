"""AdaMix: a mixture of adapters with random routing."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from compose.kind.adapter import Adapter
from train.learner.reparametrize import attributes, fold, reparametrize
from train.method import Method, MethodOptions, register
from train.steps.objective import learned, loss_sum


class AdamixOptions(MethodOptions):
    """The mixture."""

    copies: int = Field(4, ge=1, description="M, modules at each place")
    of: Literal["bottleneck", "lora"] = Field("bottleneck", description="kind of the modules, and of what is stored")
    share: Literal["up", "down", "none"] = Field(
        "up", description="the projection of which there is one for all copies: it learns at each step"
    )


class CopyChoice:
    """Which copy is used in the forward under way: one draw for a weight and its bias."""

    def __init__(self, copies: int) -> None:
        self.copies, self.index = copies, 0

    def draw(self) -> None:
        """From torch's stream, which the loop starts anew at each step."""
        self.index = int(torch.randint(self.copies, ()))


class Copies(nn.Module):
    """M tensors as one (M, ...): the chosen one while training, their mean otherwise."""

    def __init__(self, choice: CopyChoice) -> None:
        super().__init__()
        self.choice = choice

    def forward(self, stack: Tensor) -> Tensor:
        """One tensor."""
        return stack[self.choice.index] if self.training else stack.mean(0)

    def right_inverse(self, tensor: Tensor) -> Tensor:
        """Deep copies of one start."""
        return tensor.expand(self.choice.copies, *tensor.shape).clone()


@register("adamix")
class Adamix(Method):
    """M copies of each down projection, one of which a forward takes at random. Stores the mean of the copies.

    The copies share the up projection, as in the paper's own runs; `share: none` has copies of both, each of which
    learns from one step in M. Loss: `CE + (KL(p1 || p2) + KL(p2 || p1)) / 2` of two passes with different draws, each
    KL's target held constant.
    """

    kind = "bottleneck"
    paper = "arXiv:2205.12410"
    alone = "each step takes two passes, for each of which the copies are drawn anew"
    Options = AdamixOptions
    own: AdamixOptions

    def create(self, model: PreTrainedModel, name: str, kind: str, *args: Any, **options: Any) -> Adapter:
        """Of the kind that the options say."""
        return super().create(model, name, self.own.of, *args, **options)

    def prepare(self, model: PreTrainedModel, adapter: Adapter, tokenizer: Any) -> None:
        """Copies of every tensor that is not shared; a weight shares its draw with its bias."""
        self._choices: dict[tuple[str, str], CopyChoice] = {}
        parts = {"down": ("down", "down_b", "A"), "up": ("up", "up_b", "B")}
        names = [name for part, names in parts.items() if part != self.own.share for name in names]
        for path, name in list(attributes(adapter, *names)):
            choice = self._choices.setdefault((path, name.removesuffix("_b")), CopyChoice(self.own.copies))
            reparametrize(adapter, path, name, Copies(choice))

    def loss(self, model: nn.Module, batch: dict[str, Tensor], task: str) -> Tensor:
        """Of two passes; the task's loss is that of the first."""
        first, second = (self._pass(model, batch, task) for _ in range(2))
        loss = loss_sum(task, first, batch["labels"])
        if task == "regression":
            return loss + (first - second).float().square().sum()
        p, q = (F.log_softmax(learned(task, out, batch["labels"])[0].float(), -1) for out in (first, second))
        return loss + (_divergence(p, q) + _divergence(q, p)) / 2

    def _pass(self, model: nn.Module, batch: dict[str, Tensor], task: str) -> Tensor:
        for choice in self._choices.values():
            choice.draw()
        return self.logits(model, batch, task)

    def finish(self, model: PreTrainedModel, learner: Adapter) -> Adapter:
        """The mean."""
        fold(learner)
        return learner


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum over rows of `KL(p || q)`, p held constant."""
    return F.kl_div(log_q, log_p.detach(), reduction="sum", log_target=True)
