"""Prompt atoms: trained embeddings before the input, put in before a model's forward and taken off its outputs.

Rows may have prompts of different lengths (or none): they are right-aligned against the text, the rest is masked, and
positions are shifted back by :class:`compose.slot.PositionSlot`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compose.kernels import expand


@dataclass(frozen=True)
class PromptState:
    """Embeddings (R, n, d), right-aligned, and mask (R, n): 1 where a row has a virtual token."""

    embeddings: Tensor
    mask: Tensor

    @property
    def length(self) -> int:
        """n, the longest row's."""
        return int(self.mask.shape[1])

    def shortfall(self) -> Tensor:
        """How many tokens each row's prompt is short of the longest, (R,)."""
        return self.length - self.mask.sum(1)


def stack_prompts(rows: Sequence[Sequence[Tensor]], like: Tensor) -> PromptState:
    """Lay out each row's prompts (n_i, d) end to end, right-aligned."""
    joined = [torch.cat([like.new_zeros(0, like.shape[1]), *(p.to(like.device) for p in row)]) for row in rows]
    n = max(len(j) for j in joined)
    padded = torch.stack([F.pad(j, (0, 0, n - len(j), 0)) for j in joined])
    mask = torch.tensor([[0] * (n - len(j)) + [1] * len(j) for j in joined], device=like.device)
    return PromptState(padded, mask)


def bound_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward call by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def extend_mask(state: PromptState, mask: Tensor, batch: int) -> Tensor:
    """Mask (B, T) -> (B, n + T)."""
    return torch.cat([_rows(state.mask, batch).to(mask.dtype), mask], dim=1)


def extend_inputs(state: PromptState, embedding: nn.Module, owner: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments with the prompt put before the text (in prefill), or only accounted for (with a cache)."""
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    source = cast("Tensor", ids if ids is not None else embeds)
    batch, length, n = source.shape[0], source.shape[1], state.length
    out = dict(kwargs)
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    cache = kwargs.get("past_key_values")
    prefill = cache is None or not cache.get_seq_length()
    seen = length if cache is None or prefill else int(cache.get_seq_length()) - n + length
    if mask is None:
        mask = torch.ones(batch, seen, dtype=torch.long, device=source.device)
    if mask.dim() == 2 and mask.shape[1] <= seen:  # a caller further out may have extended it already
        out["attention_mask"] = extend_mask(state, mask, batch)
    if positions is not None:
        front = torch.arange(n, device=source.device).expand(positions.shape[0], n)
        out["position_ids"] = torch.cat([front, positions + n], dim=1) if prefill else positions + n
    if not prefill:
        return out
    if embeds is None:
        embeds = embedding(ids)
        if positions is None:
            _roberta_positions(owner, cast("Tensor", ids), n, out)
    prompt = _rows(state.embeddings, batch).to(embeds.dtype)
    out["input_ids"], out["inputs_embeds"] = None, torch.cat([prompt, embeds], dim=1)
    for name, fill in (("token_type_ids", 0), ("labels", -100)):
        given = kwargs.get(name)
        if isinstance(given, Tensor) and given.dim() == 2 and given.shape[1] == length:
            out[name] = F.pad(given, (n, 0), value=fill)
    if "input_ids" not in kwargs:
        del out["input_ids"]
    return out


def _roberta_positions(owner: nn.Module, ids: Tensor, n: int, out: dict[str, Any]) -> None:
    """RoBERTa counts positions over real tokens when it sees ids, over all when it sees embeddings: keep the first."""
    for module in owner.modules():
        create = getattr(module, "create_position_ids_from_input_ids", None)
        if create is not None:
            start = int(module.padding_idx) + 1  # type: ignore[arg-type]
            text = create(ids, module.padding_idx)
            front = torch.arange(start, start + n, device=ids.device).expand(ids.shape[0], n)
            out["position_ids"] = torch.cat([front, torch.where(text >= start, text + n, text)], dim=1)
            return


def trim_outputs(output: Any, n: int, total: int) -> Any:
    """Take the n virtual positions off every token-level output of length ``total``."""

    def cut(name: str, value: Any) -> Any:
        if name == "hidden_states" and isinstance(value, tuple):
            return tuple(cut("last_hidden_state", v) for v in value)
        depth = {"logits": 3, "last_hidden_state": 3, "start_logits": 2, "end_logits": 2}.get(name)
        if isinstance(value, Tensor) and value.dim() == depth and value.shape[1] == total:
            return value[:, n:]
        return value

    if hasattr(output, "items"):
        for name, value in list(output.items()):
            output[name] = cut(name, value)
    return output


def _rows(x: Tensor, batch: int) -> Tensor:
    return x.expand(batch, *x.shape[1:]) if x.shape[0] == 1 else expand(x, batch)
