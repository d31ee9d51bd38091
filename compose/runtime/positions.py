"""Position ids behind prefixes: a text after a prefix of n virtual tokens stands at n, n + 1, ..."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from compose.kernels.low_rank import expand
from compose.slots.slot import Context


class PositionSlot(nn.Module):
    """Wraps the module that reads position ids and moves them on by a number per row.

    Tokens after a prefix of n stand at n, n + 1, ..., as after n tokens in the cache.
    """

    is_slot = True

    def __init__(self, base_layer: nn.Module, context: Context) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.context = context
        self.offset: Tensor | None = None  # (R, 1)
        self._place = position_argument(base_layer)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, *args: Any, **options: Any) -> Any:
        """The base module on moved ids."""
        if self.offset is not None and self._place is not None:
            name, index = self._place
            if name in options:
                options[name] = self._moved(options[name], self.offset)
            else:
                args = (*args[:index], self._moved(args[index], self.offset), *args[index + 1 :])
        return self.base_layer(*args, **options)

    def _moved(self, ids: Tensor, offset: Tensor) -> Tensor:
        offset = offset.to(ids.device)
        if ids.dim() == 1:
            ids = ids[None]
        return ids + (expand(offset, self.context.batch) if offset.shape[0] > 1 else offset)


def position_argument(module: nn.Module) -> tuple[str, int] | None:
    """Name and place of the argument that holds position ids, or None: then the module makes them up itself."""
    names = list(inspect.signature(module.forward).parameters)
    if "position_ids" in names and "input_ids" not in names:
        return "position_ids", names.index("position_ids")
    return (names[0], 0) if type(module) is nn.Embedding else None
