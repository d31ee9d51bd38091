"""What a batch under way has read: its key-value cache with the masks that go with it, and one step over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from router.engine.host import Host


class CausalState:
    """Texts of a causal model, padded on the left, over one cache.

    Parameters
    ----------
    mask
        (B, T) over the cache.
    prompted
        Whether an adapter's prompt stands in front of some text: all rows share its places, so none may leave.
    """

    def __init__(self, cache: DynamicCache, mask: Tensor, *, prompted: bool) -> None:
        self.cache, self.mask, self.prompted = cache, mask, prompted
        self.leaves = not prompted

    @property
    def grows(self) -> bool:
        """Whether rows may be put beside these: not with prompts, nor with a cache that drops what is far away."""
        return not self.prompted and all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def step(self, host: Host, last: Sequence[int]) -> Tensor:
        """Logits (B, V) after one more token for each row."""
        self.mask = F.pad(self.mask, (0, 1), value=1)
        ids = torch.tensor(last, device=self.mask.device)[:, None]
        options = {"attention_mask": self.mask} if self.prompted or not bool(self.mask.all()) else {}
        positions = host.takes(position_ids=self.mask.sum(1, keepdim=True) - 1)
        out = host.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **options, **positions)
        logits: Tensor = out.logits[:, -1]
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Leave out all rows but these."""
        at = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(at)
        self.mask = self.mask[at]

    def add(self, other: CausalState) -> None:
        """Put another's rows beside these; both end at the same place."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.keys = torch.cat([_shifted(mine.keys, length), _shifted(theirs.keys, length)])
            mine.values = torch.cat([_shifted(mine.values, length), _shifted(theirs.values, length)])
        self.mask = torch.cat([F.pad(m, (length - m.shape[1], 0)) for m in (self.mask, other.mask)])


class Seq2SeqState:
    """Texts that the encoder of an encoder-decoder has read, once each, and what its decoder has said of them so far.

    Decoders count their places from the first token on, so rows that began at different times do not share a batch.

    Parameters
    ----------
    states
        The encoder's last hidden states (B, S, d), with the places of adapters' prompts.
    mask
        (B, S) over the texts, without such places.
    """

    grows = False

    def __init__(self, cache: EncoderDecoderCache, states: Tensor, mask: Tensor, *, prompted: bool) -> None:
        self.cache, self.states, self.mask = cache, states, mask
        self.leaves = not prompted

    def step(self, host: Host, last: Sequence[int]) -> Tensor:
        """Logits (B, V) after one more token for each row."""
        out = host.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=self.states),
            attention_mask=self.mask,
            decoder_input_ids=torch.tensor(last, device=self.mask.device)[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Leave out all rows but these."""
        at = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(at)
        self.states, self.mask = self.states[at], self.mask[at]


DecodingState: TypeAlias = CausalState | Seq2SeqState


def read_by_encoder(host: Host, ids: Tensor, mask: Tensor, *, prompted: bool) -> tuple[Seq2SeqState, Tensor]:
    """Let an encoder-decoder read texts (B, S), padded on the right; logits (B, V) of each row's first token."""
    config = host.model.config
    cache = EncoderDecoderCache(*(DynamicCache(config=config.get_text_config(decoder=True)) for _ in range(2)))
    start = torch.tensor([host.starts], device=ids.device).expand(len(ids), -1)
    out: Any = host.model(
        input_ids=ids, attention_mask=mask, decoder_input_ids=start, past_key_values=cache, use_cache=True
    )
    return Seq2SeqState(cache, out.encoder_last_hidden_state, mask, prompted=prompted), out.logits[:, -1]


def _shifted(x: Tensor, length: int) -> Tensor:
    """(B, H, T, d) to (B, H, length, d), the new places in front; they are masked."""
    return F.pad(x, (0, 0, length - x.shape[2], 0))
