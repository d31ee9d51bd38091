"""Rows that are being read: prompts in chunks over a cache of their own, and what comes of them.

Rows of like length that arrive together are read together. When a prompt has been read its row has its first token and
joins a batch; a row that is classified has its result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from compose.algebra import normalize
from compose.expr.tree import IDENTITY, Add, Call, Expr, Ref, Scale, add, seq
from router.engine.batches.classify import apply_heads
from router.engine.batches.decoding import DecodingBatch, activate, longest
from router.engine.batches.kv_cache import CausalState, read_by_encoder
from router.engine.batches.running_row import RunningRow
from router.engine.host import Host
from router.engine.prepare import PreparedRow

MOST_LOGITS = 2**24  # alive at once, where every place's are wanted: 64 MiB in float32
_LEAST_COLUMNS = 8  # of each row in one chunk


class Reading:
    """Rows read together, all of one gate, and all written or all classified.

    Attributes
    ----------
    rows
        Those that are read; `batch` holds the ones that go on, once :meth:`advance` has said that all is read.
    steady
        Whether chunks must be of one size, however fast the machine is just now.
    """

    def __init__(self, host: Host, rows: Sequence[RunningRow], *, steady: bool = False) -> None:
        self.host, self.rows, self.steady = host, list(rows), steady
        self.gate = rows[0].prepared.gate
        self.batch: DecodingBatch | None = None
        self.generates = rows[0].prepared.generates
        self.whole = not (host.decodes and not host.translates and host.is_plain)  # in one piece, whatever its length
        self.lanes = [lane for row in rows for lane in row.lanes]
        self._read = 0
        self._state: CausalState | None = None
        self._before: Tensor | None = None  # the last logits of an ensemble's lanes (lanes, V): of the next chunk
        for row in rows:
            mixture = row.prepared.target.mixture
            row.mix = None if mixture is None else mixture.begin(host.model.device)

    @property
    def length(self) -> int:
        """Columns of the text."""
        return max(len(row.prepared.ids) for row in self.rows)

    @property
    def left(self) -> int:
        """Tokens that are still to be read."""
        return (self.length - self._read) * len(self.lanes)

    @property
    def _hears(self) -> bool:
        """Whether logits of all places are wanted."""
        return self.rows[0].mix is not None or self.rows[0].prepared.request.prompt_scores

    @property
    def bytes(self) -> int:
        """Of the cache."""
        return 0 if self._state is None else self._state.bytes

    @torch.inference_mode()
    def advance(self, tokens: int) -> bool:
        """Read about so many tokens more; whether all is read.

        Raises
        ------
        HubError
            Something that cannot be activated.
        """
        activate(self.host, self.gate, self.lanes)
        if self.host.translates:
            return self._read_by_encoder()
        if not self.host.decodes:
            return self._classify_with_encoder()
        if self._state is None:
            self._begin()
        columns = self.length - self._read if self.whole else self._columns(tokens)
        if self.generates:
            self._read_to_write(min(self.length, self._read + columns))
        else:
            self._read_to_classify(min(self.length, self._read + columns))
        return self._read == self.length

    def _begin(self) -> None:
        rows = [row.prepared for row in self.rows for _ in row.lanes]
        self._ids, self._mask = _pad(rows, self.host.pad, self.host.model.device, left=True)
        self._front = self.host.runtime.prompt_places(len(rows))
        self._state = CausalState(self.host, self._mask[:, :0], longest(self.rows))

    def _columns(self, tokens: int) -> int:
        if self._hears:
            tokens = min(tokens, MOST_LOGITS // int(self.host.model.get_output_embeddings().weight.shape[0]))
        columns = max(_LEAST_COLUMNS, tokens // len(self.lanes))
        # A prompt that is made from a text reads its beginning, so that has to be in the first chunk.
        return columns if self._front is None or self._read else max(columns, int(self._front.shape[1]))

    def _options(self, end: int) -> dict[str, Any]:
        assert self._state is not None  # noqa: S101 - made at the first chunk
        part = slice(self._read, end)
        positions = (self._mask.cumsum(1) - 1).clamp_min(0)[:, part]
        return {
            "input_ids": self._ids[:, part],
            "attention_mask": self._mask[:, :end],
            "use_cache": True,
            "past_key_values": self._state.cache,
            **self.host.takes(position_ids=positions),
        }

    def _read_to_write(self, end: int) -> None:
        assert self._state is not None  # noqa: S101
        mixed = self.rows[0].mix is not None
        # A place, and not "the last one": a slice of the states is not contiguous, and a matrix product over it copies
        # the whole vocabulary's weights for each row (torch 2.13; 32 rows of 48 and 32 tokens in bf16: 25 s and not 7).
        last = torch.tensor([end - self._read - 1], device=self._ids.device)
        only_last = {} if self._hears else self.host.takes(logits_to_keep=last)
        logits = self.host.model(**self._options(end), **only_last).logits
        if mixed:
            self._hear(logits.float(), end)
        elif self._hears:
            self._score(logits.float(), end)
        self._read = end
        if end < self.length:
            return
        front = self._mask[:, :0] if self._front is None else self._front.to(self._mask)
        self._state.mask = torch.cat([front, self._mask], 1)
        if self._front is not None:
            for row in self.rows:
                row.decoding = tuple(without_prompts(lane, self.host) for lane in row.lanes)
        self.batch = DecodingBatch(self.host, self.gate, self.rows, self._state)
        self.batch.choose(logits[:, -1])

    def _hear(self, logits: Tensor, end: int) -> None:
        """What an ensemble's experts said of the prompt is the evidence for their first weights."""
        said = logits if self._before is None else torch.cat([self._before[:, None], logits], 1)
        begin = self._read - (self._before is not None)  # the place whose successor comes first
        self._before = logits[:, -1]
        told = self._ids[:, begin + 1 : end]
        log_probs = said[:, : told.shape[1]].log_softmax(-1).gather(-1, told[..., None])[..., 0]  # (lanes, n)
        real = (self._mask[:, begin + 1 : end] & self._mask[:, begin : end - 1]).bool()
        top = 0
        for row in self.rows:
            assert row.mix is not None  # noqa: S101 - rows of ensembles are read by themselves
            at = slice(top, top + len(row.lanes))
            row.mix.hear(log_probs[at].T[real[top]].double())
            top += len(row.lanes)

    def _score(self, logits: Tensor, end: int) -> None:
        """What the model said of the prompts' tokens, for rows that want to know it."""
        said = logits if self._before is None else torch.cat([self._before[:, None], logits], 1)
        begin = self._read - (self._before is not None)
        self._before = logits[:, -1]
        for i, row in enumerate(self.rows):
            ids = row.prepared.ids
            empty = self.length - len(ids)
            for place in range(max(begin, empty) + 1, end):
                row.read(ids[place - empty], said[i, place - 1 - begin])

    def _read_to_classify(self, end: int) -> None:
        options = self._options(end)
        if end - self._read == self.length:  # nothing comes after
            options |= {"use_cache": False, "past_key_values": None}
        states: BaseModelOutputWithPast = self.host.backbone(**options)
        self._pool(states, self._mask[:, self._read : end])
        self._read = end
        if end == self.length:
            self._classify(states, self._mask, last=True)

    def _pool(self, states: Any, mask: Tensor) -> None:
        """What the states (B, [front +] n, d) of a chunk say of rows whose vectors are wanted; its mask is (B, n)."""
        for row, hidden, real in zip(self.rows, states.last_hidden_state, mask.bool(), strict=True):
            if row.pool is not None:
                row.pool.add(hidden[-len(real) :][real])

    def _classify(self, states: Any, mask: Tensor, *, last: bool) -> None:
        """All is read: labels and vectors."""
        apply_heads(self.host, self.rows, states, mask, last=last)
        for row in self.rows:
            if row.pool is not None:
                row.embed()

    def _read_by_encoder(self) -> bool:
        """Texts of an encoder-decoder: (B, S), padded on the right; its encoder reads them this once."""
        prepared = [row.prepared for row in self.rows]
        ids, mask = _pad(prepared, self.host.pad, self.host.model.device, left=False)
        prompted = self.host.runtime.prompt_places(len(prepared)) is not None
        state, logits = read_by_encoder(self.host, ids, mask, prompted=prompted)
        self._read = self.length
        self.batch = DecodingBatch(self.host, None, self.rows, state)
        self.batch.choose(logits)
        return True

    def _classify_with_encoder(self) -> bool:
        """Texts of an encoder: (B, T), padded on the right."""
        prepared = [row.prepared for row in self.rows]
        ids, mask = _pad(prepared, self.host.pad, self.host.model.device, left=False)
        options = {}
        if any(p.types is not None for p in prepared):
            options["token_type_ids"] = _types(prepared, ids)
        states = self.host.backbone(input_ids=ids, attention_mask=mask, **options)
        self._pool(states, mask)
        self._classify(states, mask, last=False)
        self._read = self.length
        return True


def without_prompts(expr: Expr, host: Host) -> Expr:
    """What is applied to a row whose prompt is in its cache: prompts act where a text begins, and nowhere else."""
    known = host.runtime.adapters
    adapter = known.get(expr.text if isinstance(expr, Ref) else str(normalize(expr)))  # a merge is known by its text
    if adapter is not None:
        return IDENTITY if adapter.prompt() is not None else expr
    if isinstance(expr, Call):  # one that chooses sites
        inside = [without_prompts(arg, host) for arg in expr.args]
        return IDENTITY if IDENTITY in inside else Call(expr.function, inside, expr.options)
    if isinstance(expr, Scale):
        inner = without_prompts(expr.of, host)
        return IDENTITY if inner == IDENTITY else Scale(expr.factor, inner)
    parts = [part for child in expr.children if (part := without_prompts(child, host)) != IDENTITY]
    return IDENTITY if not parts else add(*parts) if isinstance(expr, Add) else seq(*parts)


def _pad(rows: Sequence[PreparedRow], fill: int, device: Any, *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T)."""
    longest = max(len(p.ids) for p in rows)
    ids = torch.full((len(rows), longest), fill)
    mask = torch.zeros_like(ids)
    for i, p in enumerate(rows):
        place = slice(longest - len(p.ids), None) if left else slice(0, len(p.ids))
        ids[i, place] = torch.tensor(p.ids)
        mask[i, place] = 1
    return ids.to(device), mask.to(device)


def _types(rows: Sequence[PreparedRow], ids: Tensor) -> Tensor:
    types = torch.zeros_like(ids)
    for i, p in enumerate(rows):
        if p.types is not None:
            types[i, : len(p.types)] = torch.tensor(p.types)
    return types
