"""What a merge asks to be measured on data: forwards, and backwards if need be, with one of its members active."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from compose.base.model import tokenizer_of
from compose.base.sites import linear_shape
from compose.base.texts import encode
from compose.errors import KindError
from compose.parameter_space.job import Member
from compose.parameter_space.statistic import Statistic
from compose.runtime.model_runtime import Runtime
from hub.console.progress import Steps

Batches: TypeAlias = Sequence[Mapping[str, Any]]
Data: TypeAlias = Batches | Mapping[str, Batches]
_MOST_TOKENS = 512  # of a text
_ROOM = 2**28  # numbers kept at a time, over all members: 1 GiB of float32


class Measurements:
    """Values of a statistic, site by site: as many sites are measured in one pass over the data as there is room for.

    Parameters
    ----------
    paths
        The sites, in the order in which they will be asked for.
    data
        Arguments of forward calls: the same ones for all members, or those of each member by its text.

    Raises
    ------
    KindError
        A member without data, data of none, or no loss to differentiate: named.
    """

    def __init__(
        self,
        runtime: Runtime,
        statistic: type[Statistic],
        members: Sequence[Member],
        paths: Sequence[str],
        data: Data,
        progress: Steps | None = None,
    ) -> None:
        self._runtime, self._statistic, self._members, self._progress = runtime, statistic, members, progress
        self._paths = list(paths)
        self._data = [list(_of_member(str(member.expr), data)) for member in members]
        if isinstance(data, Mapping) and (odd := data.keys() - {str(member.expr) for member in members}):
            raise KindError(f"data is given for {min(odd)!r}, which is no argument of this merge")
        self._values: dict[str, list[Tensor]] = {}

    def at(self, path: str) -> list[Tensor]:
        """The value of each member at a site."""
        if path not in self._values:
            self._values = self._measure(self._window(path))
        return self._values[path]

    def _layer(self, path: str) -> nn.Module:
        return self._runtime.slot(path).layer

    def _window(self, path: str) -> list[str]:
        """The sites from ``path`` on whose values fit into memory together, but at least that one."""
        window: list[str] = []
        room = _ROOM
        for following in self._paths[self._paths.index(path) :]:
            d_in, d_out = linear_shape(self._layer(following)) or (0, 0)
            rows, columns = self._statistic.shape(d_out, d_in)
            room -= rows * columns * len(self._members)
            if window and room < 0:
                break
            window.append(following)
        return window

    def _measure(self, paths: Sequence[str]) -> dict[str, list[Tensor]]:
        values: dict[str, list[Tensor]] = {path: [] for path in paths}
        with self._runtime.as_it_was():
            for member, batches in zip(self._members, self._data, strict=True):
                for adapter in member.adapters:
                    if adapter.name not in self._runtime.adapters:  # made by a merge inside this one
                        self._runtime.add(adapter.name, adapter)
                self._runtime.activate([member.expr], {})
                for path, statistic in self._of_active(paths, batches).items():
                    if statistic.total is None:
                        raise KindError(f"{member.expr}: {path} did not run in any of its {len(batches)} batches")
                    values[path].append(statistic.total)
        return values

    def _of_active(self, paths: Sequence[str], batches: Batches) -> dict[str, Statistic]:
        statistics = {path: self._statistic() for path in paths}
        calls = [part for batch in batches for part in (_rows(batch) if self._statistic.gradients else [batch])]
        for done, call in enumerate(calls):
            call = {k: v.to(self._runtime.model.device) if isinstance(v, Tensor) else v for k, v in call.items()}  # noqa: PLW2901
            with self._watched(statistics, call), torch.set_grad_enabled(self._statistic.gradients):
                output = self._runtime.model(**call)
                if self._statistic.gradients:
                    if getattr(output, "loss", None) is None:
                        raise KindError("a batch without labels has no loss", hint="give each batch its labels")
                    output.loss.backward()
            if self._progress is not None:
                self._progress("measure", done + 1, len(calls))
        return statistics

    @contextmanager
    def _watched(self, statistics: Mapping[str, Statistic], call: Mapping[str, Any]) -> Iterator[None]:
        """Count what enters the layers in the call inside, and the gradient of what leaves them."""
        probes: list[tuple[Statistic, Tensor, Tensor]] = []

        def watch(statistic: Statistic) -> Any:
            def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
                x = _tokens(args[0].detach(), call)
                if not statistic.gradients:
                    statistic.add(x)
                    return None
                # Nothing of the base asks for a gradient; a zero that is added to its output does.
                probe = torch.zeros_like(output, requires_grad=True)
                probes.append((statistic, x, probe))
                return output + probe

            return hook

        hooks = [self._layer(path).register_forward_hook(watch(s)) for path, s in statistics.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for statistic, x, probe in probes:
            if probe.grad is not None:
                statistic.add(x, probe.grad.flatten(0, -2).float())


def batches_of(texts: Sequence[str], model: PreTrainedModel, *, size: int = 8) -> list[dict[str, Tensor]]:
    """Texts as batches for ``model``, padded on the right; a causal model's labels are the texts."""
    most = min(getattr(model.config, "max_position_embeddings", None) or _MOST_TOKENS, _MOST_TOKENS)
    rows = encode(tokenizer_of(model), texts, most=most)
    batches = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        mask = pad_sequence([torch.ones_like(row) for row in part], batch_first=True)
        batch = {"input_ids": pad_sequence(part, batch_first=True), "attention_mask": mask}
        if model.can_generate() and not model.config.is_encoder_decoder:
            batch["labels"] = batch["input_ids"].masked_fill(mask == 0, -100)
        batches.append(batch)
    return batches


def _of_member(text: str, data: Data) -> Batches:
    if not isinstance(data, Mapping):
        batches: Batches = data
    elif text in data:
        batches = data[text]
    else:
        raise KindError(f"there is no data for {text!r}", hint="data: " + ", ".join(map(repr, data)))
    if not batches:
        raise KindError(f"the data for {text!r} is empty", hint="give some batches")
    return batches


def _rows(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a batch, each as a batch of its own."""
    count = next(len(value) for value in batch.values() if isinstance(value, Tensor))
    for i in range(count):
        yield {
            name: value[i : i + 1] if isinstance(value, Tensor) and value.shape[:1] == (count,) else value
            for name, value in batch.items()
        }


def _tokens(x: Tensor, call: Mapping[str, Any]) -> Tensor:
    """The inputs of a layer as (n, d_in) float32, zero where the call's mask has padding."""
    tokens = x.flatten(0, -2).float()
    masks = (call.get(name) for name in ("attention_mask", "decoder_attention_mask"))
    mask = next((m for m in masks if isinstance(m, Tensor) and m.numel() == len(tokens)), None)
    return tokens if mask is None else tokens * mask.reshape(-1, 1).to(tokens)
