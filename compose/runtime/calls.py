"""Around a call of the model: its batch is measured, live adapters are lowered anew, prompts go in and come off.

This stands in the forwards that are called from outside: the model's, its backbone's, and (by ``generate``) an
encoder's. Only the outermost call counts, and for prompts of an encoder-decoder the encoder's. However a call ends,
by an error or by Ctrl-C, nothing of it is left.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compose.base.sites import FINAL, SiteMap
from compose.errors import KindError
from compose.runtime import prompts as prompting
from compose.runtime.composition import Composition
from compose.runtime.idle import Watch
from compose.runtime.loss import loss_over_own_tokens
from compose.runtime.prompts import Entrance, PromptState
from compose.slots.caches import tokens_before
from compose.slots.call import Call, Context, Standing

Prepare: TypeAlias = Callable[[nn.Module, Mapping[str, Any]], None]  # by the module called and its arguments
IDS = ("input_ids", "decoder_input_ids")
STATES = ("inputs_embeds", "decoder_inputs_embeds")


class Doorway(Standing):
    """Stands in the forward of a module that is called from outside."""

    outermost = True

    def __init__(self, module: nn.Module, calls: ModelCalls) -> None:
        super().__init__(module)
        self._calls = calls
        self._open = True

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output with the active composition applied."""
        if args and args[0] is self.layer:
            args = args[1:]  # accelerate binds what it finds here to the module once more
        return self._calls.run(self, args, kwargs) if self._open else self.own(*args, **kwargs)

    def enter(self) -> None:
        """Stand in the module's forward, from now on."""
        self._open = True
        super().enter()

    def leave(self) -> None:
        """Leave the module's forward as it was; where others hold on to what stood there, it is let through."""
        super().leave()
        self._open = False


class ModelCalls:
    """The calls of one model. ``prepare`` makes the active composition anew where that is due."""

    def __init__(self, model: PreTrainedModel, sites: SiteMap, context: Context, prepare: Prepare) -> None:
        self._model, self._context, self._prepare = model, context, prepare
        self._encoder = model.get_encoder() if sites.is_encoder_decoder else None
        self.entrance = _entrance(model, sites)
        self._can_leave_out = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.watch = Watch(model)
        backbone = model.base_model
        called = [model, *([backbone] if backbone is not model else []), *([self._encoder] if self._encoder else [])]
        self._doors = [Doorway(module, self) for module in called]

    def enter(self) -> None:
        """Stand in the forwards that are called from outside."""
        for door in self._doors:
            door.enter()

    def leave(self) -> None:
        """Leave them as they were."""
        for door in self._doors:
            door.leave()

    def run(self, door: Doorway, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of the module behind ``door``."""
        context = self._context
        if context.under_way:
            call = context.call
            if door.layer is not self._encoder or call.composition.prompt is None:
                return door.own(*args, **kwargs)
            return self._prompted(door, call, _bound(door, args, kwargs), outermost=False)
        given = _bound(door, args, kwargs)
        self._prepare(door.layer, given)
        call = context.new()
        try:
            context.begin(call)
            self._measure(call, door.layer, given)
            with self.watch.over(call), loss_over_own_tokens(self._model, call.composition.vocabulary, given):
                if call.composition.prompt is not None:
                    output = self._prompted(door, call, given, outermost=True)
                else:
                    output = door.own(*args, **kwargs)
            if door.layer is self._model and FINAL in call.composition.programs and not call.sided:
                raise KindError(
                    f"a side network did nothing: {type(self._model).__name__} goes past what makes its final states",
                    hint="`hub compose kinds` lists those that act inside the model",
                )
            return output
        finally:
            try:
                context.end(call)
            finally:
                context.end(call)  # Ctrl-C may have come in the midst of it

    def with_prompt(self, prompt: PromptState, given: dict[str, Any]) -> Any:
        """The model's output for these arguments behind a prompt that is not active, in this thread."""
        idle = self._context.idle
        call = Call(Composition(prompt=prompt), idle.batch, idle.lengths)
        try:
            self._context.begin(call)
            return self._prompted(self._doors[0], call, given, outermost=True)
        finally:
            self._context.end(call)

    def _measure(self, call: Call, module: nn.Module, kwargs: Mapping[str, Any]) -> None:
        composition: Composition = call.composition
        call.batch = batch = _batch(module, kwargs)
        lengths = _lengths(kwargs)
        extra = () if composition.prompt is None else tuple(n + composition.prompt.length for n in lengths)
        call.lengths = (*lengths, *extra)
        if composition.measures_past:
            call.past, call.places = tokens_before(kwargs) or 0, _positions(kwargs)
        if composition.count > 1 and (not batch or batch % composition.count):
            raise KindError(
                f"the active composition has {composition.count} rows and the batch has {batch}",
                hint="activate one expression per row, or one for all",
            )

    def _prompted(self, door: Doorway, call: Call, kwargs: dict[str, Any], *, outermost: bool) -> Any:
        prompt, module = cast("PromptState", call.composition.prompt), door.layer
        if self._encoder is not None and module is not self._encoder:
            return door.own(**self._for_cross_attention(call, prompt, kwargs))
        if not outermost:  # the call around this one has extended the mask, which cross-attention reads as well
            kwargs = {**kwargs, "attention_mask": call.text_mask}
        extended = prompting.extend_inputs(prompt, self.entrance, kwargs)
        arguments, places = extended.arguments, extended.places
        call.places = _positions(arguments) if call.composition.measures_past else None
        if places is None:  # the cache holds the prompt
            return door.own(**arguments)
        batch, total = places.shape
        text = total - prompt.length
        given = {name for name, value in kwargs.items() if value is not None}
        if module is self._model and extended.layout.order is None and not given & {"labels", "logits_to_keep"}:
            arguments.update(self._logits_of(text))
        if arguments.get("input_ids") is not None:
            front = extended.embeddings  # (B, n, d)
            blank = front.new_zeros(1, 1, 1).expand(batch, text, front.shape[2])
            call.prompt = places[..., None], extended.layout.join(front, blank)
        trims = module is not self._encoder  # whose states cross-attention reads with the prompt's
        as_tuple = trims and _wants_tuple(self._model, kwargs)
        output = door.own(**({**arguments, "return_dict": True} if as_tuple else arguments))
        if call.prompt is not None:
            raise KindError(
                f"the prompt did not go in: {type(module).__name__} looks its input_ids up in another table than the "
                "one it calls its input embeddings",
                hint="leave the prompt out, or call the model with inputs_embeds",
            )
        if not trims:
            return output
        trimmed = prompting.trim_outputs(output, extended.layout, total)
        return trimmed.to_tuple() if as_tuple else trimmed

    def _logits_of(self, length: int) -> dict[str, int]:
        """The option that spares the logits of all but the last places, where the model has one."""
        return {"logits_to_keep": length} if self._can_leave_out else {}

    @staticmethod
    def _for_cross_attention(call: Call, prompt: PromptState, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments whose mask, which cross-attention reads as well, has room for the encoder's prompt."""
        mask, states = kwargs.get("attention_mask"), kwargs.get("encoder_outputs")
        if mask is None and prompt.uneven:
            given = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
            given, extra = (states[0], prompt.length) if states is not None else (given, 0)
            assert given is not None  # noqa: S101 - the model has a source text in one form or another
            mask = torch.ones(given.shape[0], given.shape[1] - extra, dtype=torch.long, device=given.device)
        call.text_mask = mask
        return kwargs if mask is None else {**kwargs, "attention_mask": prompting.extend_mask(prompt, mask)}


def _bound(door: Doorway, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward call by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(type(door.layer).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _batch(module: nn.Module, kwargs: Mapping[str, Any]) -> int:
    named = getattr(module, "main_input_name", "input_ids")
    names = ("input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_features", named)
    source = next((kwargs[n] for n in (*names, "encoder_outputs") if kwargs.get(n) is not None), None)
    if source is None:
        return 0
    return int(source.shape[0] if isinstance(source, Tensor) else source[0].shape[0])


def _positions(kwargs: Mapping[str, Any]) -> Tensor | None:
    positions = kwargs.get("position_ids")
    return positions if isinstance(positions, Tensor) and positions.dim() == 2 else None


def _lengths(kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """How many tokens each row of the texts of a call has, by ids (B, T) or states (B, T, d)."""
    texts = [(kwargs.get(name), end) for names, end in ((IDS, None), (STATES, -1)) for name in names]
    return tuple(math.prod(text.shape[1:end]) for text, end in texts if isinstance(text, Tensor))


def _wants_tuple(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> bool:
    wanted = kwargs.get("return_dict")
    return not (getattr(model.config, "return_dict", True) if wanted is None else wanted)


def _entrance(model: PreTrainedModel, sites: SiteMap) -> Entrance:
    config = sites.config
    special: set[int] = set()
    for name in ("pad", "eos", "bos", "sep", "cls", "decoder_start"):
        ids = getattr(config, f"{name}_token_id", None)
        special.update(ids if isinstance(ids, list) else [ids] if isinstance(ids, int) else [])
    positions = [model.get_submodule(path) for path in sites.positions]
    first = next((int(m.padding_idx) + 1 for m in positions if isinstance(getattr(m, "padding_idx", None), int)), 0)
    read_off_mask = any("attention_mask" in inspect.signature(m.forward).parameters for m in positions)
    return Entrance(
        filler=next(i for i in range(len(special) + 1) if i not in special),
        first_position=first,
        explicit_positions=bool(positions) and not read_off_mask,
        windows=any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")),
    )
