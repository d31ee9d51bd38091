"""What a batch under way has read: its key-value cache with the mask that goes with it, and one step over it.

The cache of a causal model is made of plain full layers for every base: a sliding window is a matter of the model's own
mask over columns, so rows with windows join and leave like others. It takes at most

    bytes(rows, longest) = rows x longest x layers x 2 x kv_heads x head_dim x itemsize

with ``longest`` the most places (prompt, virtual tokens and continuation) that one of the rows may take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from router.engine.host import Host

BLOCK = 64  # places by which a cache grows
_SIDE = "moduloom_side"  # where side networks keep the places of their own layers in a cache


@dataclass
class Bound:
    """The most places that a row of a cache may take."""

    longest: int


class BlockLayer(DynamicLayer):  # type: ignore[misc]  # transformers gives it no types
    """Keys and values (B, H, T, d) at the front of larger tensors: a token is written in place."""

    keys: Any
    values: Any

    def __init__(self, bound: Bound) -> None:
        super().__init__()
        self.bound = bound
        self.held: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_options: Any) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new places; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        if self.held is None:
            room = self._capacity(end)
            keys, values = (t.new_empty(*t.shape[:2], room, t.shape[3]) for t in (key_states, value_states))
            self.held = keys, values
        elif end > self.held[0].shape[2]:
            self._lay(((self.keys, self.values),), begin, self._capacity(end))
        assert self.held is not None  # noqa: S101 - made above
        for held, new in zip(self.held, (key_states, value_states), strict=True):
            held[:, :, begin:end] = new
        self._show(end)
        return self.keys, self.values

    def arrange(self, parts: Sequence[tuple[Tensor, Tensor]], width: int) -> None:
        """Hold these rows (each part (b, H, t, d)), aligned on the right in so many places."""
        self._lay(parts, width, self._capacity(width))
        self._show(width)

    def release(self) -> None:
        """Let the tensors go."""
        self.held = self.keys = self.values = None
        self.is_initialized = False

    @property
    def bytes(self) -> int:
        """Of its tensors."""
        return 0 if self.held is None else sum(t.numel() * t.element_size() for t in self.held)

    def _capacity(self, end: int) -> int:
        return max(end, min(-(-end // BLOCK) * BLOCK, self.bound.longest))

    def _lay(self, parts: Sequence[tuple[Tensor, Tensor]], width: int, capacity: int) -> None:
        keys, values = (_laid([part[i] for part in parts], width, capacity) for i in (0, 1))
        self.held, self.is_initialized = (keys, values), True

    def _show(self, end: int) -> None:
        assert self.held is not None  # noqa: S101 - called with something held
        self.keys, self.values = (t[:, :, :end] for t in self.held)


def _laid(parts: Sequence[Tensor], width: int, capacity: int) -> Tensor:
    """Rows below each other, each ending at ``width``; places in front of a row are zero, as they are masked."""
    first = parts[0]
    out = first.new_empty(sum(len(p) for p in parts), first.shape[1], capacity, first.shape[3])
    top = 0
    for part in parts:
        own = min(part.shape[2], width)
        rows = out[top : top + len(part)]
        rows[:, :, : width - own] = 0
        rows[:, :, width - own : width] = part[:, :, part.shape[2] - own :]
        top += len(part)
    return out


class CausalState:
    """Texts of a causal model, aligned on the right, over one cache.

    Attributes
    ----------
    mask
        (B, T) over the cache.
    joins
        Whether rows may be put beside these, and leave.
    """

    def __init__(self, host: Host, mask: Tensor, longest: int) -> None:
        self.bound, self.mask = Bound(longest), mask
        self.cache = DynamicCache(config=host.model.config)
        self.joins = host.is_plain
        if self.joins:
            self.cache.layers = [BlockLayer(self.bound) for _ in self.cache.layers]

    @property
    def width(self) -> int:
        """Places of each row."""
        return int(self.mask.shape[1])

    @property
    def bytes(self) -> int:
        """Of the cache."""
        return sum(layer.bytes for layer in self.cache.layers if isinstance(layer, BlockLayer))

    def step(self, host: Host, last: Sequence[int]) -> Tensor:
        """Logits (B, V) after one more token for each row."""
        self.mask = F.pad(self.mask, (0, 1), value=1)
        ids = torch.tensor(last, device=self.mask.device)[:, None]
        options = {} if bool(self.mask.all()) else {"attention_mask": self.mask}
        positions = host.takes(position_ids=self.mask.sum(1, keepdim=True) - 1)
        out = host.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **options, **positions)
        logits: Tensor = out.logits[:, -1]
        return logits

    def empty_in_front(self, rows: Sequence[int]) -> int:
        """Places in front that are masked in all of these rows."""
        return int(self.mask[list(rows)].any(0).int().argmax())

    def keep(self, rows: Sequence[int], longest: int) -> None:
        """Leave out all rows but these, and the places in front that none of them has."""
        at, cut = torch.tensor(rows, device=self.mask.device), self.empty_in_front(rows)
        self.bound.longest = longest
        if not self.joins:
            self.cache.batch_select_indices(at)
            self.mask = self.mask[at]
            return
        self._drop_stale()
        for layer in self._filled():
            layer.arrange([(layer.keys[at], layer.values[at])], self.width - cut)
        self.mask = self.mask[at, cut:]

    def add(self, other: CausalState, longest: int) -> None:
        """Put another's rows beside these; both end at the same place. The other is of no use afterwards."""
        width = max(self.width, other.width)
        self.bound.longest = longest
        self._drop_stale()
        other._drop_stale()
        self._match_side_layers(other)
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            assert isinstance(mine, BlockLayer) and isinstance(theirs, BlockLayer)  # noqa: S101 - only such states join
            parts = [(layer.keys, layer.values) for layer in (mine, theirs) if layer.is_initialized]
            if len(parts) == 2:
                mine.arrange(parts, width)
            theirs.release()
        self.mask = torch.cat([F.pad(m, (width - m.shape[1], 0)) for m in (self.mask, other.mask)])

    def _filled(self) -> list[BlockLayer]:
        return [layer for layer in self.cache.layers if isinstance(layer, BlockLayer) and layer.is_initialized]

    def _side(self) -> dict[str, int]:
        found: dict[str, int] = self.cache.__dict__.setdefault(_SIDE, {})
        return found

    def _drop_stale(self) -> None:
        """Side networks that no row uses any more have not grown with the rest; plain layers of theirs become ours."""
        kept = {n: at for n, at in self._side().items() if self.cache.layers[at].get_seq_length() == self.width}
        own = self.cache.layers[: len(self.cache.layers) - len(self._side())]
        side = [self._owned(self.cache.layers[at]) for at in kept.values()]
        self.cache.layers = [*own, *side]
        self.cache.__dict__[_SIDE] = {name: len(own) + i for i, name in enumerate(kept)}

    def _owned(self, layer: Any) -> BlockLayer:
        if isinstance(layer, BlockLayer):
            return layer
        owned = BlockLayer(self.bound)
        owned.lazy_initialization(layer.keys, layer.values)
        owned.arrange([(layer.keys, layer.values)], layer.keys.shape[2])
        return owned

    def _match_side_layers(self, other: CausalState) -> None:
        """Give both the layers of both's side networks, in one order; where a row has none, they are zero."""
        count = len(self.cache.layers) - len(self._side())
        names = list(dict.fromkeys([*self._side(), *other._side()]))
        shapes = {n: s.cache.layers[at] for s in (self, other) for n, at in s._side().items()}
        for state in (self, other):
            had = {n: state.cache.layers[at] for n, at in state._side().items()}
            state.cache.layers = [
                *state.cache.layers[:count],
                *(had[n] if n in had else state._blank(shapes[n]) for n in names),
            ]
            state.cache.__dict__[_SIDE] = {name: count + i for i, name in enumerate(names)}

    def _blank(self, like: Any) -> BlockLayer:
        blank = BlockLayer(self.bound)
        blank.lazy_initialization(like.keys, like.values)
        rows = [t.new_zeros(len(self.mask), t.shape[1], self.width, t.shape[3]) for t in (like.keys, like.values)]
        blank.arrange([(rows[0], rows[1])], self.width)
        return blank


class Seq2SeqState:
    """Texts that the encoder of an encoder-decoder has read, once each, and what its decoder has said of them so far.

    Decoders count their places from the first token on, so rows that began at different times do not share a batch.

    Parameters
    ----------
    states
        The encoder's last hidden states (B, S, d), with the places of adapters' prompts.
    mask
        (B, S) over the texts, without such places.
    prompted
        Whether an adapter's prompt stands in front of some text: all rows share its places, so none may leave.
    """

    joins = False
    bytes = 0  # transformers' own layers, which count themselves

    def __init__(self, cache: EncoderDecoderCache, states: Tensor, mask: Tensor, *, prompted: bool) -> None:
        self.cache, self.states, self.mask, self.prompted = cache, states, mask, prompted

    @property
    def width(self) -> int:
        """Places of each row."""
        return int(self.cache.get_seq_length())

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

    def empty_in_front(self, _rows: Sequence[int]) -> int:
        """Decoders begin at one place."""
        return 0

    def keep(self, rows: Sequence[int], _longest: int) -> None:
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
