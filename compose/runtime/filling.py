"""Whether prompts of unlike lengths can stand side by side: what fills up the shorter rows must be without effect.

Attention leaves masked places out. A recurrent layer does so if its family sees to it (Mamba), or takes them into its
state (RWKV, RecurrentGemma), and then every token after them is another one. A trial call of the bare base tells.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from compose.errors import KindError
from compose.runtime.composition import Composition
from compose.runtime.prompts import Entrance, PromptState, extend_inputs
from compose.runtime.row_trials import FAILURES

_BOUND = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the largest output; 0.05 in half precision


class Filling:
    """The trial of one model; ``at_rest`` makes it its bare base for a while."""

    def __init__(
        self, model: PreTrainedModel, entrance: Entrance, at_rest: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self._model, self._entrance, self._at_rest = model, entrance, at_rest
        self._enters: bool | None = None

    def before(self, composition: Composition) -> None:
        """Refuse prompts of unlike lengths where what fills up the shorter rows enters the model's state.

        Raises
        ------
        KindError
            They are, and it does.
        """
        prompt = composition.prompt
        if prompt is None or not prompt.causal or not prompt.uneven:
            return
        if self._enters is None:
            fake = isinstance(next(self._model.parameters()).data, FakeTensor)  # whose calls only count operations
            self._enters = not fake and self._try()
        if self._enters:
            raise KindError(
                f"prompts of unlike lengths cannot stand side by side in this {self._model.config.model_type} model: "
                "what fills up the shorter rows enters its state, mask or not",
                hint="activate prompts of one length in a batch, or one composition for all its rows",
            )

    @torch.no_grad()
    def _try(self) -> bool:
        table: Any = self._model.get_input_embeddings()
        ids = torch.arange(4, device=self._model.device)[None] + self._entrance.filler
        blank = table.weight.new_zeros(2, 3, table.weight.shape[1])
        state = PromptState(blank, torch.tensor([3, 0], device=ids.device), causal=True)
        try:
            with self._at_rest():
                filled = self._model(**extend_inputs(state, self._entrance, {"input_ids": ids.expand(2, -1)}).arguments)
                plain = self._model(input_ids=ids)
        except FAILURES:  # a model that asks for more than a text, such as images
            return False
        filled, plain = filled[0][1:, 3:].float(), plain[0].float()
        if filled.shape != plain.shape:
            return False
        bound = _BOUND.get(self._model.dtype, 0.05) * float(plain.abs().max())
        return bool((filled - plain).abs().max() > bound)
