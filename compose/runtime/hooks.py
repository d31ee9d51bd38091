"""Around a call of the model: its batch is measured, live adapters are lowered anew, prompts go in and come off.

Hooks stand on the modules that are called from outside: the model, its backbone, and (by ``generate``) an encoder.
Only the outermost call counts, and for prompts of an encoder-decoder the encoder's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compose.base.sites import SiteMap
from compose.errors import KindError
from compose.runtime import prompts as prompting
from compose.runtime.prompts import Entrance, Layout, PromptState
from compose.slots.slot import Context, Slot


class CallHooks:
    """The hooks on one model. ``rows`` is how many rows the active composition tells apart (1: any batch)."""

    def __init__(self, model: PreTrainedModel, sites: SiteMap, context: Context, prepare: Callable[[], None]) -> None:
        self.rows = 1
        self.measures_past = False  # whether the length of the cache is asked for
        self.prompt: PromptState | None = None
        self.embedding: Slot | None = None  # where the prompt goes in
        self._model, self._context, self._prepare = model, context, prepare
        self._encoder = model.get_encoder() if sites.is_encoder_decoder else None
        self._entrance = _entrance(model, sites)
        self._can_leave_out = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._open: list[nn.Module] = []
        self._prompted: nn.Module | None = None  # the module of the call that the prompt went into
        self._layout: Layout | None = None  # of the rows of that call, if its outputs are to be trimmed
        self._total = 0  # length of its text with the prompt
        self._as_tuple = False
        self._text_mask: Tensor | None = None  # of the source text of an encoder-decoder
        backbone = model.base_model
        called = [model, *([backbone] if backbone is not model else []), *([self._encoder] if self._encoder else [])]
        self._hooks = [hook for module in called for hook in self._watch(module)]

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model lowers its own adapters, at its first call.
        return {**self.__dict__, "prompt": None, "_open": [], "_prompted": None, "_layout": None, "_text_mask": None}

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _watch(self, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._forget(module)  # a call that was interrupted (Ctrl-C) has not been left
        self._open.append(module)
        outermost = len(self._open) == 1
        if not outermost and module is not self._encoder:
            return None
        kwargs = prompting.bound_arguments(module, args, kwargs)
        if outermost:
            self._measure(kwargs)
            self._prepare()
        if self.prompt is None:
            return None
        if self._encoder is not None and module is not self._encoder:
            return (), self._for_cross_attention(self.prompt, kwargs)
        return (), self._put_in(self.prompt, module, kwargs, outermost)

    def _measure(self, kwargs: Mapping[str, Any]) -> None:
        self._context.batch = batch = _batch(kwargs)
        if self.measures_past:
            cache = kwargs.get("past_key_values")
            self._context.past = 0 if cache is None else int(cache.get_seq_length())
        if self.rows > 1 and batch % self.rows:
            raise KindError(
                f"the active composition has {self.rows} rows and the batch has {batch}",
                hint="activate one expression per row, or one for all",
            )

    def _put_in(self, prompt: PromptState, module: nn.Module, kwargs: dict[str, Any], outermost: bool) -> Any:
        if not outermost:  # the call around this one has extended the mask, which cross-attention reads as well
            kwargs = {**kwargs, "attention_mask": self._text_mask}
        extended = prompting.extend_inputs(prompt, self._entrance, kwargs)
        arguments, places = extended.arguments, extended.places
        self._prompted, self._layout, self._total = module, None, 0
        if places is not None:
            batch, self._total = places.shape
            if module is not self._encoder:  # whose states cross-attention reads with the prompt's
                self._layout = extended.layout
            given = {name for name, value in kwargs.items() if value is not None}
            if module is self._model and extended.layout.order is None and not given & {"labels", "logits_to_keep"}:
                arguments.update(self._logits_of(self._total - prompt.length))
            if arguments.get("input_ids") is not None and self.embedding is not None:
                front = extended.embeddings  # (B, n, d)
                text = front.new_zeros(1, 1, 1).expand(batch, self._total - prompt.length, front.shape[2])
                self.embedding.put = places[..., None], extended.layout.join(front, text)
        self._as_tuple = self._layout is not None and _wants_tuple(self._model, kwargs)
        return {**arguments, "return_dict": True} if self._as_tuple else arguments

    def _logits_of(self, length: int) -> dict[str, int]:
        """The option that spares the logits of all but the last places, where the model has one."""
        return {"logits_to_keep": length} if self._can_leave_out else {}

    def _for_cross_attention(self, prompt: PromptState, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments whose mask, which cross-attention reads as well, has room for the encoder's prompt."""
        mask, states = kwargs.get("attention_mask"), kwargs.get("encoder_outputs")
        if mask is None and prompt.uneven:
            given = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
            given, extra = (states[0], prompt.length) if states is not None else (given, 0)
            assert given is not None  # noqa: S101 - the model has a source text in one form or another
            mask = torch.ones(given.shape[0], given.shape[1] - extra, dtype=torch.long, device=given.device)
        self._text_mask = mask
        return kwargs if mask is None else {**kwargs, "attention_mask": prompting.extend_mask(prompt, mask)}

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        self._forget(module)
        if module is not self._prompted:
            return output
        layout, total, as_tuple = self._layout, self._total, self._as_tuple
        self._prompted, self._layout, self._total, self._as_tuple = None, None, 0, False
        if self.embedding is not None:
            self.embedding.put = None
        if layout is None or output is None:
            return output
        trimmed = prompting.trim_outputs(output, layout, total)
        return trimmed.to_tuple() if as_tuple else trimmed

    def _forget(self, module: nn.Module) -> None:
        if module in self._open:
            del self._open[self._open.index(module) :]


def _batch(kwargs: Mapping[str, Any]) -> int:
    names = ("input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_features", "encoder_outputs")
    source = next((kwargs[n] for n in names if kwargs.get(n) is not None), None)
    if source is None:
        return 0
    return int(source.shape[0] if isinstance(source, Tensor) else source[0].shape[0])


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
    )
