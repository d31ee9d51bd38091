"""Whether prompts of unlike lengths can stand side by side: what fills up the shorter rows must be without effect.

Attention leaves masked places out. But some models have no mask (FNet), convolve over it (ConvBERT), count places from
the first on (CTRL), look at the last (SigLIP), or take it into a recurrent state (RWKV). A trial tells: two rows
are called behind prompts of unlike lengths, and the row of the shorter one then by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from compose.base.sites import SiteMap
from compose.errors import KindError
from compose.runtime.composition import Composition
from compose.runtime.prompts import PromptState
from compose.runtime.row_trials import FAILURES
from compose.runtime.trial_inputs import Sizes, TrialInputs

_ROWS = Sizes(2, 5)
_BOUND = {torch.float32: 3e-5, torch.float64: 1e-9}  # share of an output by which rounding may move it
_IN_HALF = 0.05


class Filling:
    """The trial of one model.

    ``at_rest`` makes it its bare base for a while; ``with_prompt`` then calls it behind a prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: SiteMap,
        at_rest: Callable[[], AbstractContextManager[Any]],
        with_prompt: Callable[[PromptState, dict[str, Any]], Any],
    ) -> None:
        self._model, self._sites, self._at_rest, self._with_prompt = model, sites, at_rest, with_prompt
        self._why: str | None = None  # they cannot; "": they can

    def check(self, composition: Composition) -> None:
        """Refuse prompts of unlike lengths where what fills up the shorter rows has an effect.

        Raises
        ------
        KindError
            They are, and it does.
        """
        if composition.prompt is None or not composition.prompt.uneven:
            return
        if self._why is None:
            fake = isinstance(next(self._model.parameters()).data, FakeTensor)  # whose calls only count operations
            self._why = "" if fake else self._try()
        if self._why:
            model = f"this {self._sites.model_type} model"
            raise KindError(
                f"prompts of unlike lengths cannot stand side by side in {model}: {self._why}",
                hint="activate prompts of one length in a batch, or one composition for all its rows",
            )

    @torch.no_grad()
    def _try(self) -> str:
        table = cast("Tensor", self._model.get_submodule(self._sites.embedding).weight)
        words = torch.randn(2, 3, table.shape[1], generator=torch.Generator().manual_seed(0)).to(table.device)
        counts = torch.tensor([3, 1], device=table.device)
        both = PromptState(words, counts, self._sites.reads_causally)
        short = replace(both, embeddings=words[1:, 2:], counts=counts[1:])
        like = {"input_ids": torch.empty(1, 1, dtype=torch.long, device="meta")}
        rows = TrialInputs(self._model, self._model, like).drawn(_ROWS, 0)
        try:
            with self._at_rest():
                together = self._with_prompt(both, rows)
                alone = self._with_prompt(short, {name: value[1:] for name, value in rows.items()})
        except FAILURES:
            return "it asks for more than a text, so that it cannot be tried"
        return "" if _alike(together, alone) else "what fills up the shorter rows is read there, mask or not"


def _alike(together: Mapping[str, Any], alone: Mapping[str, Any]) -> bool:
    """Whether the outputs of the last of two rows are those of the row alone, wherever they have the same shape."""
    pairs = [(value[1:], alone.get(name)) for name, value in together.items() if isinstance(value, Tensor)]
    found = [_close(a, b) for a, b in pairs if isinstance(b, Tensor) and a.shape == b.shape]
    return bool(found) and all(found)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).float().norm() <= _BOUND.get(a.dtype, _IN_HALF) * b.float().norm())
