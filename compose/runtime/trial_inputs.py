"""Arguments of trial calls: small random rows, in the form of a call at hand or as the config of the model says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from compose.base.sites import input_embeddings

TEXTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")  # (B, T), (B, T, d)
_NOT_READ = ("mask", "position_ids", "labels", "past_key_values")  # ends of names that a trial call does without
_MOST = 1000  # ids to draw from


@dataclass(frozen=True)
class Sizes:
    """Rows, and tokens of each."""

    rows: int
    length: int


Make: TypeAlias = Callable[[Sizes, torch.Generator], Any]  # an argument, drawn at random


class TrialInputs:
    """What calls of ``module`` are made of: ``of_rows``, the inputs that have a row each, and the ``others`` as given.

    ``given`` are the arguments of a call. Images and sounds come by rows where they are the model's only input or a
    decoder reads them; beside a text nothing says whose they are.
    """

    def __init__(self, module: nn.Module, model: PreTrainedModel, given: Mapping[str, Any]) -> None:
        self._model, self._device = model, _device(model)
        takes = inspect.signature(module.forward).parameters
        pairs = bool(model.config.is_encoder_decoder)
        self.of_rows: dict[str, Make] = {}
        for stem in ("", "decoder_"):
            ids, states = given.get(f"{stem}input_ids"), given.get(f"{stem}inputs_embeds")
            if ids is None and states is not None and f"{stem}input_ids" not in takes:
                self.of_rows[f"{stem}inputs_embeds"] = self._states(states.shape[-1])
            elif ids is not None or states is not None:
                self.of_rows[f"{stem}input_ids"] = self._ids(() if ids is None else tuple(ids.shape[1:-1]))
        if (states := given.get("encoder_outputs")) is not None:
            make = self._states(states[0].shape[-1])
            self.of_rows["encoder_outputs"] = lambda sizes, generator: BaseModelOutput(make(sizes, generator))
        elif pairs or not self.of_rows:
            self.of_rows |= {name: self._like(given[name]) for name in _features(module, model, given)}
        if pairs and "decoder_input_ids" in takes:
            self.of_rows.setdefault("decoder_input_ids", self._ids(()))
        self.others = {
            name: value
            for name, value in given.items()
            if isinstance(value, Tensor)
            and name in takes
            and name not in (*self.of_rows, *TEXTS)
            and not name.endswith(_NOT_READ)
        }

    @property
    def reads_text(self) -> bool:
        """Whether rows are texts, whose length is known."""
        return not self.of_rows.keys().isdisjoint(TEXTS)

    def drawn(self, sizes: Sizes, seed: int) -> dict[str, Any]:
        """Random rows."""
        generator = torch.Generator().manual_seed(seed)
        return {name: make(sizes, generator) for name, make in self.of_rows.items()}

    def cut(self, rows: int, *, changed: bool = False) -> dict[str, Tensor]:
        """The other inputs for so many rows, from those at hand, or something else in their place."""
        return {name: _cut(value, rows, changed=changed) for name, value in self.others.items()}

    def _ids(self, between: tuple[int, ...]) -> Make:
        ordinary = torch.tensor(ordinary_ids(self._model))

        def make(sizes: Sizes, generator: torch.Generator) -> Tensor:
            picks = torch.randint(len(ordinary), (sizes.rows, *between, sizes.length), generator=generator)
            return ordinary[picks].to(self._device)

        return make

    def _states(self, width: int) -> Make:
        def make(sizes: Sizes, generator: torch.Generator) -> Tensor:
            states = torch.randn(sizes.rows, sizes.length, width, generator=generator)
            return states.to(self._device, self._model.dtype)

        return make

    def _like(self, value: Tensor) -> Make:
        def make(sizes: Sizes, generator: torch.Generator) -> Tensor:
            shape = sizes.rows, *value.shape[1:]
            if value.is_floating_point():
                return torch.randn(shape, generator=generator).to(self._device, value.dtype)
            return torch.randint(1, 8, shape, generator=generator).to(self._device, value.dtype)

        return make


def form(given: Mapping[str, Any]) -> Hashable:
    """What is alike in calls that one trial stands for: which inputs there are, and of images how large."""

    def shape(name: str, value: Any) -> Hashable:
        if not isinstance(value, Tensor):
            return None
        return value.dim() if name in TEXTS or name.endswith((*_NOT_READ, "ids")) else tuple(value.shape[1:])

    return tuple(sorted((name, str(shape(name, value))) for name, value in given.items() if value is not None))


def example(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """The form of a call that needs no example: of a text, or of an image whose size the config names."""
    main, config = model.main_input_name, model.config
    if main == "input_ids":
        return {main: torch.empty(1, 1, dtype=torch.long, device="meta")}
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    if main == "pixel_values" and len(sides) == 2 and isinstance(channels, int):
        return {main: torch.empty(1, channels, *sides, dtype=model.dtype, device="meta")}
    return None


def exchanged(first: Mapping[str, Any], other: Mapping[str, Any], row: int) -> dict[str, Any]:
    """Arguments with one row of others."""

    def mix(a: Any, b: Any) -> Any:
        if not isinstance(a, Tensor):
            return BaseModelOutput(mix(a[0], b[0]))
        mixed = a.clone()
        mixed[row] = b[row]
        return mixed

    return {name: mix(value, other[name]) for name, value in first.items()}


def ordinary_ids(model: PreTrainedModel) -> list[int]:
    """Ids that every table of the model has and that mean nothing special (padding, an image to be put in)."""
    special: set[int] = set()
    limits = [_MOST]

    def look(fields: Mapping[Any, Any]) -> None:
        for key, value in fields.items():
            name = str(key)
            if isinstance(value, Mapping):
                look(value)
            elif name.endswith(("token_id", "token_ids", "token_index")):
                special.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
            elif name.endswith("vocab_size") and "type" not in name and isinstance(value, int) and value > 0:
                limits.append(value)

    look(model.config.to_dict())
    table = getattr(input_embeddings(model), "weight", None)
    if isinstance(table, Tensor) and table.dim() == 2:
        limits.append(table.shape[0])
    return [i for i in range(min(limits)) if i not in special] or [0]


def _features(module: nn.Module, model: PreTrainedModel, given: Mapping[str, Any]) -> Iterator[str]:
    """Names of the arguments with the images or sounds of the rows."""
    names = {getattr(module, "main_input_name", ""), model.main_input_name, "pixel_values", "input_features"}
    for name in sorted(names - set(TEXTS)):
        if isinstance(given.get(name), Tensor):
            yield name


def _device(model: PreTrainedModel) -> torch.device:
    """Where inputs go: to the embeddings, if layers lie on several devices."""
    table = getattr(input_embeddings(model), "weight", None)
    return table.device if isinstance(table, Tensor) and table.device.type != "meta" else model.device


def _cut(value: Tensor, rows: int, *, changed: bool) -> Tensor:
    if value.dim() == 0 or value.shape[0] == 0:
        return value
    cut = value[torch.arange(rows, device=value.device) % value.shape[0]]
    return cut + torch.randn(cut.shape).to(cut) if changed and cut.is_floating_point() else cut
