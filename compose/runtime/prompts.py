"""Prompt atoms: trained embeddings before the text, put in on the way into a model and taken off its outputs.

Rows may have prompts of different lengths, or none. Before a causal model they end where the text begins, so that the
rows share one cache: ``[. p p t t t]``. Padding before a text stands behind the prompt, as PEFT has it; but before it,
``[. . p p t]``, where positions are told and windows count places. Before an encoder a row stands as it would alone,
from the first place on and without a gap, and what fills it up comes last: ``[p p t t t .]``. The filling is masked,
like padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from compose.atoms import Prompt
from compose.errors import KindError
from compose.kernels.low_rank import expand
from compose.slots.caches import tokens_before


@dataclass(frozen=True)
class TextPrompt:
    """A prompt made from the text of each of ``rows`` rows from ``row`` on: ``length`` embeddings from ``start`` on."""

    row: int
    start: int
    length: int
    of: Callable[[Tensor], Tensor]
    rows: int = 1


@dataclass(frozen=True)
class PromptState:
    """Embeddings (R, n, d), right-aligned in the longest row's n, and how many of them each row has, counts (R,)."""

    embeddings: Tensor
    counts: Tensor
    causal: bool
    from_text: tuple[TextPrompt, ...] = ()

    @property
    def length(self) -> int:
        """n, the longest row's."""
        return int(self.embeddings.shape[1])

    @property
    def uneven(self) -> bool:
        """Whether some row's prompt is shorter than the longest."""
        return bool((self.counts < self.length).any())

    def shortfall(self) -> Tensor:
        """How many tokens each row's prompt is short of the longest, (R, 1)."""
        return (self.length - self.counts)[:, None]

    def on(self, batch: int) -> PromptState:
        """The same for each row of a batch."""
        if len(self.counts) == batch:
            return self
        times = batch // len(self.counts)
        from_text = tuple(replace(m, row=m.row * times, rows=m.rows * times) for m in self.from_text)
        return replace(
            self,
            embeddings=repeat(self.embeddings, batch),
            counts=repeat(self.counts, batch),
            from_text=from_text,
        )

    def for_texts(self, ids: Tensor | None, mask: Tensor) -> PromptState:
        """The same for the rows of a batch (B, T), with the prompts that are made from their texts."""
        if not self.from_text:
            return self.on(len(mask))
        if ids is None:
            raise KindError("a prompt that is made from the text needs input_ids, not inputs_embeds")
        state = self.on(len(mask))
        first, last = mask.long().argmax(1), mask.sum(1).long() - 1  # (B,)
        embeddings = state.embeddings.clone()
        for prompt in state.from_text:
            rows = slice(prompt.row, prompt.row + prompt.rows)
            steps = torch.arange(prompt.length, device=ids.device)
            places = first[rows, None] + torch.minimum(steps, last[rows, None].clamp_min(0))
            values = prompt.of(ids[rows].gather(1, places))
            embeddings[rows, prompt.start : prompt.start + prompt.length] = values.to(embeddings)
        return replace(state, embeddings=embeddings)

    def mask(self) -> Tensor:
        """(R, n): 1 where a row has a virtual token."""
        return (torch.arange(self.length, device=self.counts.device) >= self.shortfall()).long()

    def layout(self, mask: Tensor, *, near: bool = False) -> Layout:
        """How rows of text with the mask (B, T) stand behind their prompts; ``near``: no padding is between."""
        if self.causal:
            padding = mask.long().cumsum(1) == 0
            if not near or not bool(padding[:, 0].any()):
                return Layout(self.length, None)
            front = padding.new_ones(len(mask), self.length).long()
            return Layout(self.length, torch.cat([front, 2 * (~padding).long()], dim=1).argsort(dim=1, stable=True))
        filling = torch.cat([self.on(len(mask)).mask().to(mask.device), mask.long()], dim=1) == 0
        return Layout(self.length, filling.long().argsort(dim=1, stable=True))


@dataclass(frozen=True)
class Layout:
    """Where the n + T places of each row stand: ``order`` (B, n + T) says what comes where; None is as it is."""

    prompt: int
    order: Tensor | None

    def join(self, front: Tensor, text: Tensor) -> Tensor:
        """(B, n, ...) and (B, T, ...) to (B, n + T, ...)."""
        whole = torch.cat([front, text], dim=1)
        return whole if self.order is None else _take(whole, self.order)

    def cut(self, value: Tensor) -> Tensor:
        """The text's part of an output (B, n + T, ...)."""
        return value[:, self.prompt :] if self.order is None else _take(value, self.order.argsort(1)[:, self.prompt :])


def _take(x: Tensor, places: Tensor) -> Tensor:
    return torch.take_along_dim(x, places.to(x.device).reshape(*places.shape, *[1] * (x.dim() - 2)), dim=1)


def repeat(x: Tensor, batch: int) -> Tensor:
    """The R rows of x, each repeated to a batch of k R rows."""
    return x.expand(batch, *x.shape[1:]) if x.shape[0] == 1 else expand(x, batch)


def stack_prompts(rows: Sequence[Sequence[Prompt]], like: Tensor, *, causal: bool) -> PromptState:
    """Lay out each row's prompts (n_i, d) end to end."""
    joined = [
        torch.cat([like.new_zeros(0, like.shape[1]), *(p.embeddings.to(like.device) for p in row)]) for row in rows
    ]
    n = max(len(j) for j in joined)
    padded = torch.stack([F.pad(j, (0, 0, n - len(j), 0)) for j in joined])
    from_text: list[TextPrompt] = []
    for i, row in enumerate(rows):
        start = n - len(joined[i])
        for p in row:
            if p.of is not None:
                from_text.append(TextPrompt(i, start, len(p.embeddings), p.of))
            start += len(p.embeddings)
    counts = torch.tensor([len(j) for j in joined], device=like.device)
    return PromptState(padded, counts, causal, tuple(from_text))


@dataclass(frozen=True)
class Entrance:
    """What is to know of the stack a prompt enters.

    ``filler`` is the id of an ordinary token: it stands where the prompt will be, so that models which look at ids (for
    the last token that is no padding, for positions) count it. ``first_position`` is 0, or what RoBERTa starts from;
    with ``explicit_positions`` rows of different length are told their positions, which others read off the mask.
    ``windows``: some layer's attention reaches back over a number of places, whatever positions are told.
    """

    filler: int
    first_position: int
    explicit_positions: bool
    windows: bool = False


# Arguments with a value for each token, and what those of a prompt are.
_FILLS: Mapping[str, int] = {"token_type_ids": 0, "mm_token_type_ids": 0, "labels": -100}


@dataclass(frozen=True)
class ExtendedInputs:
    """Arguments with room for the prompt, how the rows stand, which places are the prompt's, and what stands there.

    ``places`` (B, n + T) is None in a step with a cache, which holds the prompt already.
    """

    arguments: dict[str, Any]
    layout: Layout
    places: Tensor | None
    embeddings: Tensor


def extend_inputs(state: PromptState, entrance: Entrance, kwargs: dict[str, Any]) -> ExtendedInputs:
    """Put the prompt's places before the text, or (with a cache) only account for them.

    Raises
    ------
    KindError
        An argument with a value for each token that a prompt knows none for, a full cache, or one without a count.
    """
    source = cast("Tensor", kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"])
    batch, length, n = source.shape[0], source.shape[1], state.length
    state = state.on(batch)
    seen = tokens_before(kwargs)  # the prompt is among them
    if seen is None:  # a state, which nothing counts: neither masks nor positions reach back
        return ExtendedInputs(kwargs, Layout(n, None), None, state.embeddings)
    _refuse_unknown(kwargs, batch, length)
    _check_room(kwargs.get("past_key_values"), length + (seen or n))
    # The mask covers what the cache holds; of that, the prompt's part is ours to add.
    mask = _mask(kwargs.get("attention_mask"), source, length + max(0, seen - n))
    layout = state.layout(mask, near=entrance.windows and kwargs.get("position_ids") is not None)
    out = {**kwargs, "attention_mask": layout.join(state.mask().to(mask), mask)}
    _extend_positions(state, entrance, layout, out, length, seen)
    # With a cache the prompt has been read: only the mask and the positions go on telling of it.
    if seen:
        return ExtendedInputs(out, layout, None, state.embeddings)
    state = state.for_texts(kwargs.get("input_ids"), mask)
    # Models look at ids (for padding, for their last token), so a prompt is an ordinary one until the embedding.
    if kwargs.get("input_ids") is not None:
        out["input_ids"] = layout.join(source.new_full((batch, n), entrance.filler), source)
    else:
        out["inputs_embeds"] = layout.join(state.embeddings.to(source.dtype), source)
    # What has a value for each token of the text needs one for each of the prompt, which no loss looks at.
    for name, fill in _FILLS.items():
        given = kwargs.get(name)
        if isinstance(given, Tensor) and given.shape == (batch, length) and not given.is_floating_point():
            out[name] = layout.join(given.new_full((batch, n), fill), given)
    if state.causal and out.get("labels") is not kwargs.get("labels"):
        # The last virtual token predicts the first of the text; in a row without a prompt there is none to do so.
        first = out["labels"][:, n]
        out["labels"][:, n] = torch.where(state.counts.to(first.device) == 0, -100, first)
    # What counts places in the text counts on from where the text begins now.
    for name in ("start_positions", "end_positions"):
        if isinstance(kwargs.get(name), Tensor):
            out[name] = kwargs[name] + (n if state.causal else state.counts)
    if isinstance(kwargs.get("logits_to_keep"), Tensor):
        out["logits_to_keep"] = kwargs["logits_to_keep"] + n
    places = layout.join(state.mask().bool(), torch.zeros_like(mask, dtype=torch.bool))
    return ExtendedInputs(out, layout, places, state.embeddings)


def _refuse_unknown(kwargs: Mapping[str, Any], batch: int, length: int) -> None:
    """Refuse what has a value for each token of the text, where a prompt has none to put before them."""
    known = {"input_ids", "attention_mask", "position_ids", *_FILLS}
    for name, value in kwargs.items():
        of_tokens = name in ("bbox", "langs") or name.endswith(("_ids", "_mask", "_mapping"))
        if name in known or not of_tokens or name.startswith(("decoder_", "encoder_", "cross_")):
            continue
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == batch and length in value.shape[1:]:
            raise KindError(
                f"a prompt stands before the text, and it is not known what {name!r} is for its {length} + n places",
                hint=f"leave {name!r} out, or the prompt",
            )


def _check_room(cache: Any, needed: int) -> None:
    layers = [layer for layer in getattr(cache, "layers", ()) if not getattr(layer, "is_sliding", False)]
    room = max((getattr(layer, "max_cache_len", 0) for layer in layers), default=0)
    if 0 < room < needed:
        raise KindError(
            f"the cache has room for {room} tokens and this call needs {needed} with the prompt before the text",
            hint="make the static cache longer by the length of the prompt (max_cache_len)",
        )


def _mask(mask: Any, source: Tensor, length: int) -> Tensor:
    if mask is None:
        return torch.ones(source.shape[0], length, dtype=torch.long, device=source.device)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise KindError("a prompt extends a mask of shape (batch, length), not one of another form")
    return mask


def extend_mask(state: PromptState, mask: Tensor) -> Tensor:
    """Mask (B, T) -> (B, n + T)."""
    return state.layout(mask).join(state.on(len(mask)).mask().to(mask), mask)


def _extend_positions(
    state: PromptState, entrance: Entrance, layout: Layout, out: dict[str, Any], length: int, seen: int
) -> None:
    """Each row's own tokens stand at 0, 1, ...: text after a prompt of n_i begins at n_i."""
    given, n, short = out.get("position_ids"), state.length, state.shortfall()
    if given is not None:
        text = given + state.counts[:, None].to(given)
        front = entrance.first_position + (torch.arange(n, device=text.device) - short).clamp_min(0)
        out["position_ids"] = text if seen else layout.join(front.to(text), text)
    elif entrance.explicit_positions and state.causal and state.uneven:
        steps = torch.arange(seen, seen + length + (0 if seen else n), device=short.device)
        out["position_ids"] = (steps - short).clamp_min(0)


def trim_outputs(output: Any, layout: Layout, total: int) -> Any:
    """Take the virtual positions off every token-level output, which are those of length n + T = ``total``."""

    def cut(name: str, value: Any) -> Any:
        if name == "hidden_states" and isinstance(value, tuple):
            return tuple(cut("last_hidden_state", v) for v in value)
        depth = {"logits": 3, "last_hidden_state": 3, "start_logits": 2, "end_logits": 2}.get(name)
        if isinstance(value, Tensor) and value.dim() == depth and value.shape[1] == total:
            return layout.cut(value)
        return value

    for name, value in list(output.items()):
        output[name] = cut(name, value)
    return output
