"""Position ids behind prefixes: a text after a prefix of n virtual tokens stands at n, n + 1, ..."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from compose.kernels.low_rank import expand
from compose.slots.call import Context, Standing, own_forward


class PositionSlot(Standing):
    """Stands in the module that reads position ids and moves them on by a number per row.

    Tokens after a prefix of n stand at n, n + 1, ..., as after n tokens in the cache.
    """

    def __init__(self, layer: nn.Module, context: Context) -> None:
        super().__init__(layer)
        self.context = context
        self._place = position_argument(layer)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The module on moved ids."""
        call = self.context.call
        offset = getattr(call.composition, "shift", None)  # (R, 1)
        if offset is not None and self._place is not None:
            name, index = self._place
            if name in options:
                options[name] = _moved(options[name], offset, call.batch)
            else:
                args = (*args[:index], _moved(args[index], offset, call.batch), *args[index + 1 :])
        return self.own(*args, **options)


def _moved(ids: Tensor, offset: Tensor, batch: int) -> Tensor:
    offset = offset.to(ids.device)
    if ids.dim() == 1:
        ids = ids[None]
    return ids + (expand(offset, batch) if offset.shape[0] > 1 else offset)


def position_argument(module: nn.Module) -> tuple[str, int] | None:
    """Name and place of the argument that holds position ids, or None: then the module makes them up itself."""
    names = list(inspect.signature(own_forward(module)).parameters)
    if "position_ids" in names and "input_ids" not in names:
        return "position_ids", names.index("position_ids")
    return (names[0], 0) if type(module) is nn.Embedding else None
