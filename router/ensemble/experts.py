"""Experts folded into the batch: E experts on B texts are E x B rows of one forward pass.

Rows are expert-major: row e * B + b is text b read by expert e.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from compose.expr.tree import Expr
from compose.runtime.model_runtime import runtime
from hub.errors import HubError, UsageError
from router.ensemble.windows import windows

Member = Expr | str | None
MAX_LOGITS = 2**24  # logits alive at once, 64 MiB in float32


@contextmanager
def active(model: PreTrainedModel, members: Sequence[Member]) -> Iterator[None]:
    """Make one composition per row active in evaluation mode; afterwards what was active is active again."""
    import compose

    model_runtime = runtime(model)
    before, training = (model_runtime.rows, model_runtime.weights, model_runtime.routing), model.training
    compose.activate(model, list(members))
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        model_runtime.activate(*before)


@torch.no_grad()
def expert_log_probs(
    model: PreTrainedModel,
    members: Sequence[Member],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    context: int | None = None,
    overlap: int | None = None,
    max_logits: int = MAX_LOGITS,
) -> tuple[Tensor, Tensor]:
    """`log p_e(x_{t+1} | x_<=t)` of every member, text and position.

    Parameters
    ----------
    members
        E expressions over adapters attached to the model; None is the bare base.
    input_ids, attention_mask
        (B, T) tokens, padded on either side; a mask of 0 is padding.
    context, overlap
        Longest window in tokens (default: the model's positions) and how many tokens neighbouring windows share
        (default: a quarter of the window).
    max_logits
        Bound on rows x positions x vocabulary in one piece: texts are taken in groups, and where one text is too much,
        in segments that continue each other's key-value cache. The result does not depend on it.

    Returns
    -------
    (E, B, T-1) float32 log probabilities in nats, 0 where `valid` is False, and valid (B, T-1): both tokens are real.

    Raises
    ------
    HubError
        A member gives NaN: it is named.
    """
    ids, mask = checked(model, input_ids, attention_mask)
    with active(model, members):
        result, valid = read_log_probs(
            model, len(members), ids, mask, context=context, overlap=overlap, max_logits=max_logits
        )
    if bool(result.isnan().any()):
        bad = result.isnan().any(2).any(0)
        _name_nan(model, members, ids[bad], mask[bad])
    return result, valid


@torch.no_grad()
def read_log_probs(
    model: PreTrainedModel,
    experts: int,
    ids: Tensor,
    mask: Tensor,
    *,
    context: int | None = None,
    overlap: int | None = None,
    max_logits: int = MAX_LOGITS,
) -> tuple[Tensor, Tensor]:
    """What `expert_log_probs` gives, of what is active: so many experts for any batch, or one that weighs tokens."""
    batch, length = ids.shape
    valid = (mask[:, 1:] & mask[:, :-1]).bool()
    context = context or context_of(model) or length
    overlap = max(1, context // 4) if overlap is None else overlap
    result = torch.zeros(experts, batch, max(length - 1, 0), device=ids.device)
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    for window in windows(length, context, overlap):
        width = window.end - window.start
        # As many texts at once as the bound allows; where one is too much already, it is read in segments.
        group = max(1, max_logits // (experts * width * vocabulary))
        segment = max(1, max_logits // (experts * min(group, batch) * vocabulary))
        for top in range(0, batch, group):
            part = slice(top, top + group)
            reader = Reader(model, ids[part, window.start : window.end], mask[part, window.start : window.end])
            read = reader.read(experts, segment)  # (E, b, width - 1)
            # Of the part that a window shares with the one before it, only context is taken.
            result[:, part, window.first - 1 : window.end - 1] = read[:, :, window.first - window.start - 1 :]
    # Padding is masked: what a model says there may be NaN without harm.
    return result.masked_fill_(~valid, 0.0), valid


class Reader:
    """Reads the rows of a folded batch piece by piece over one key-value cache."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, mask: Tensor) -> None:
        self.model, self.ids, self.mask = model, ids, mask
        self.padded = not bool(mask.all())
        # Right padding needs no positions, and a few architectures take none.
        takes = "position_ids" in inspect.signature(model.forward).parameters
        self.positions = (mask.cumsum(1) - 1).clamp(min=0) if takes and not bool(mask[:, 0].all()) else None

    def read(self, experts: int, segment: int, cache: DynamicCache | None = None) -> Tensor:
        """Log probability of each token after the first: (E, b, T-1); `cache` is filled where one is given."""
        return torch.cat([piece for piece, _ in self.pieces(experts, segment, cache)], -1)

    def pieces(self, experts: int, segment: int, cache: DynamicCache | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Log probabilities of a segment's successors (E, b, n), and its last logits (E, b, V)."""
        batch, length = self.ids.shape
        if cache is None and segment < length:
            cache = DynamicCache(config=self.model.config)
        for start in range(0, length, segment):
            end = min(start + segment, length)
            logits = self._forward(experts, start, end, cache)
            targets = self.ids[:, start + 1 : end + 1].repeat(experts, 1)  # one shorter at the end of the text
            scored = logits[:, : targets.shape[1]]
            log_probs = -functional.cross_entropy(scored.flatten(0, 1), targets.flatten(), reduction="none")
            yield log_probs.view(experts, batch, -1), logits[:, -1].view(experts, batch, -1)

    def _forward(self, experts: int, start: int, end: int, cache: DynamicCache | None) -> Tensor:
        options: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            options["past_key_values"] = cache
        if self.padded:
            options["attention_mask"] = self.mask[:, :end].repeat(experts, 1)
        if self.positions is not None:
            options["position_ids"] = self.positions[:, start:end].repeat(experts, 1)
        logits: Tensor = self.model(input_ids=self.ids[:, start:end].repeat(experts, 1), **options).logits
        return logits.float()


def checked(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens and an integer mask on the model's device.

    Raises
    ------
    UsageError
        Not a causal language model, or shapes that do not fit.
    """
    if model.config.is_encoder_decoder or not model.can_generate():
        raise UsageError(
            f"{type(model).__name__} does not predict next tokens from left to right",
            hint="DEMix mixes causal language models: compose.load(base, task='causal_lm')",
        )
    if input_ids.dim() != 2:
        raise UsageError(
            f"input_ids has shape {tuple(input_ids.shape)}, not (texts, tokens)", hint="unsqueeze one text"
        )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise UsageError(f"attention_mask {tuple(mask.shape)} does not fit input_ids {tuple(input_ids.shape)}")
    return input_ids.to(model.device), mask.to(model.device).long()


def context_of(model: PreTrainedModel) -> int | None:
    """Positions the model was made for; None where its configuration sets no bound."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return int(positions) if isinstance(positions, int) and positions > 1 else None


def _name_nan(model: PreTrainedModel, members: Sequence[Member], ids: Tensor, mask: Tensor) -> NoReturn:
    """Raise naming the members that give NaN alone: in a folded batch one expert's NaN can reach other rows."""
    names = [str(member or "base") for member in members if _gives_nan(model, member, ids, mask)]
    raise HubError(
        f"NaN probabilities from {', '.join(names) or 'the experts together'}",
        hint="hub verify the adapter: its weights, or those of the base, are broken",
    )


def _gives_nan(model: PreTrainedModel, member: Member, ids: Tensor, mask: Tensor) -> bool:
    width = context_of(model) or ids.shape[1]
    with active(model, [member]):
        logits = model(input_ids=ids[:1, :width], attention_mask=mask[:1, :width]).logits[0]
    return bool(logits[mask[0, :width].bool()].isnan().any())
