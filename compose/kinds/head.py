"""A head of its own, alone: what feature-based learning stores (the encoder stays as it is)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from compose.base.sites import SiteMap
from compose.errors import KindError
from compose.kind import heads
from compose.kind.adapter import Adapter, KindConfig
from compose.kind.registry import register


class HeadConfig(KindConfig):
    """Which modules make up the head, and how many classes it tells apart."""

    target_modules: tuple[str, ...] | str | None = Field(
        None, description="modules, by the end of their path; default: what stands outside the model's backbone"
    )
    num_labels: int | None = Field(
        None, ge=1, description="outputs; default: the base's. Another number starts from fresh values"
    )


@register("head")
class Head(Adapter):
    """`y = M'(h)` in place of `y = M(h)`, M' a copy of the base's head M at first, kept in float32 and stored whole.

    With weight w it is M(h) + w (M'(h) - M(h)). Heads may have different numbers of classes: in a mixed batch the
    logits are as wide as the widest, and a class that a row's head does not have gets the dtype's lowest number.
    """

    Config = HeadConfig
    config: HeadConfig
    paper = "arXiv:1903.05987"
    averages_in_weight = False

    @property
    def identity_at_init(self) -> bool:
        """Unless it has other classes, or layers between which a base in half precision rounds and a copy does not."""
        plain = all(isinstance(self.head(path), nn.Linear) for path in self.saved)
        return self.config.num_labels is None and (plain or not self._half)

    def build(self, sites: SiteMap, model: PreTrainedModel) -> None:
        """Copies of the modules."""
        if self.config.layers is not None or self.config.modules_to_save:
            raise KindError("a head is whole modules outside the layers: give target_modules alone")
        self._half = model.dtype != torch.float32
        for path in heads.head_modules(model, sites, self.config.target_modules):
            self._carry(path, model.get_submodule(path))
            module = self.head(path)
            assert module is not None  # noqa: S101 - just put there
            if self.config.num_labels is not None:
                self._reset(module, self.config.num_labels)

    def _reset(self, module: nn.Module, outputs: int) -> None:
        output = heads.output_layer(module)
        if output is None:
            raise KindError(f"{type(module).__name__} ends in no linear layer: its number of outputs is fixed")
        heads.widen(module, outputs)
        nn.init.normal_(output[1].weight, std=0.02, generator=self.generator)
        if output[1].bias is not None:
            nn.init.zeros_(output[1].bias)

    def state(self, *, heads: bool = True) -> dict[str, Tensor]:
        """The tensors of the head, which is all there is: they go into the weights file."""
        return self.head_state()
