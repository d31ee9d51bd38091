"""Frozen lower layers run once: their output is kept and put in again at every later step.

With the first k blocks frozen and without dropout, what enters block k is a function of the row alone. Training then
costs the upper blocks only. The first blocks are stood in for by modules that hand over what was kept, so any model
whose blocks are one `nn.ModuleList` called in order works as it is (BERT, RoBERTa, GPT-2, Llama, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from train.data.batches import Dataset

__all__ = ["Replay", "blocks_of"]

_BATCH = 32


def blocks_of(model: nn.Module) -> nn.ModuleList | None:
    """The stack of blocks, or None where there is not exactly one (encoder-decoders)."""
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return stacks[0] if len(stacks) == 1 else None


class Replay:
    """What enters block `depth` for each row of some data, and the switch that uses it.

    Parameters
    ----------
    model
        The transformers model; its blocks below `depth` carry no active adapter.
    depth
        Blocks that are frozen, at most all but one; 0 keeps nothing and `on` changes nothing.
    """

    def __init__(self, model: nn.Module, depth: int) -> None:
        blocks = blocks_of(model)
        self.blocks = blocks
        self.depth = 0 if blocks is None else min(depth, len(blocks) - 1)
        self.rows: Tensor | None = None  # of the batch under way
        self._kept: list[Tensor] = []  # (T_i, d) each
        self._tuples = False

    def __len__(self) -> int:
        return len(self._kept)

    def record(self, data: Dataset, run: Callable[[dict[str, Tensor]], Any]) -> Tensor:
        """Run `data` through the model once; returns the (N,) numbers under which its rows are kept."""
        start = len(self._kept)
        if not self.depth or self.blocks is None:
            return torch.arange(start, start + len(data))
        self._kept += [torch.empty(0)] * len(data)
        caught: list[Any] = []
        hook = self.blocks[self.depth - 1].register_forward_hook(lambda _m, _i, output: caught.append(output))
        try:
            with torch.no_grad():
                for rows, batch in data.batches(_BATCH):
                    run(batch)
                    output = caught.pop()
                    self._tuples = isinstance(output, tuple)
                    hidden = output[0] if self._tuples else output
                    for state, real, row in zip(hidden, batch["attention_mask"], rows.tolist(), strict=True):
                        self._kept[start + row] = state[real.bool()].clone()
        finally:
            hook.remove()
        return torch.arange(start, start + len(data))

    def handed(self, hidden: Tensor) -> Any:
        """(B, T, d) what was kept of the batch's rows, zeros where `hidden` (B, T, d) is padding."""
        assert self.rows is not None  # noqa: S101 - set by the call that is under way
        out = torch.zeros_like(hidden)
        for place, row in zip(out, self.rows.tolist(), strict=True):
            place[: len(self._kept[row])] = self._kept[row]
        return (out,) if self._tuples else out

    @contextmanager
    def on(self) -> Iterator[None]:
        """Let the lower blocks hand over what was kept; every call needs `rows` set."""
        if not self.depth or self.blocks is None:
            yield
            return
        real = list(self.blocks)[: self.depth]
        try:
            for i in range(self.depth):
                self.blocks[i] = _ReplayedBlock(self, real[i], last=i == self.depth - 1)
            yield
        finally:
            for i, block in enumerate(real):
                self.blocks[i] = block


class _ReplayedBlock(nn.Module):
    """Stands for a block: the last frozen one hands over what was kept, those before it do nothing."""

    def __init__(self, replay: Replay, real: nn.Module, *, last: bool) -> None:
        super().__init__()
        self._of = (replay, real)  # in a tuple: not submodules, they belong to the model
        self._last = last

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models look at attributes of their blocks (attention_type)
            return getattr(self.__dict__["_of"][1], name)

    def forward(self, hidden: Tensor, *args: Any, **options: Any) -> Any:
        """The kept states, in the form the block returns."""
        replay = self.__dict__["_of"][0]
        if self._last:
            return replay.handed(hidden)
        return (hidden,) if replay._tuples else hidden
