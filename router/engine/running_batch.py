"""A batch under way: rows come in, are read in one forward pass, and leave when they have ended.

Rows that are classified leave at once, through their own heads; the others decode side by side over one key-value
cache. Rows of a causal model may join between two steps: their cache is put beside the others', shifted to one end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from hub.errors import HubError
from router.engine.detokenize import Detokenizer
from router.engine.host import Host
from router.engine.kv_cache import CausalState, DecodingState, read_by_encoder
from router.engine.mixture import Mixture
from router.engine.prepare import PreparedRow
from router.engine.request import Piece, Result, Token
from router.engine.row_heads import blend, heads_of, pick
from router.engine.sampling import Sampler, best_tokens, choose


class RunningRow:
    """A row of a running batch.

    ``on_piece`` is called with each piece of text as it comes. ``result`` is there when it has ended, or ``error``.
    """

    def __init__(self, prepared: PreparedRow, tokenizer: Any, on_piece: Callable[[Piece], None] | None = None) -> None:
        request = prepared.request
        self.prepared, self.on_piece = prepared, on_piece
        self.result: Result | None = None
        self.error: HubError | None = None
        self.cancelled = False
        self.written = 0
        self.last = 0
        self._tokenizer = tokenizer
        self._tokens: list[Token] = []
        self._reported = 0  # of the tokens
        self._detokenizer = Detokenizer(tokenizer, prepared.before, request.stop)
        self.sampler = Sampler(request.temperature, request.top_p, request.seed) if request.temperature > 0 else None

    def take(self, token: int, logits: Tensor, ends: frozenset[int]) -> None:
        """Append a token chosen from logits (V,); ends the row where it has to."""
        self.last = token
        self.written += 1
        request = self.prepared.request
        if token in ends:
            return self._end("stop")
        if request.scores:
            log_prob, best = best_tokens(logits, token, request.scores)
            named = tuple((self._tokenizer.decode([t]), p) for t, p in best)
            self._tokens.append(Token(self._tokenizer.decode([token]), log_prob, named))
        self._say(self._detokenizer.push(token))
        if self._detokenizer.stopped:
            self._end("stop")
        elif self.written == self.prepared.room:
            self._end("length")
        return None

    def _end(self, why: str) -> None:
        self._say(self._detokenizer.close(), last=True)
        self.result = Result(
            text=self._detokenizer.text,
            finish=why,
            tokens=tuple(self._tokens),
            weights=self.prepared.weights,
            read=len(self.prepared.ids),
            written=self.written,
        )

    def _say(self, text: str, *, last: bool = False) -> None:
        if self.on_piece is not None and (text or (last and self._reported < len(self._tokens))):
            self.on_piece(Piece(text, tuple(self._tokens[self._reported :])))
            self._reported = len(self._tokens)

    @property
    def over(self) -> bool:
        """Whether nothing more is to be computed for it."""
        return self.result is not None or self.error is not None or self.cancelled

    @property
    def answer(self) -> Result | HubError:
        """What became of it."""
        answer = self.result or self.error
        assert answer is not None  # noqa: S101 - asked for once it is over
        return answer

    def fail(self) -> None:
        """End the row: the model gives NaN for it."""
        name = self.prepared.target.text or "the base"
        self.error = HubError(f"{name} gives NaN", ref=name, hint="`hub verify` it, or compute in fp32")


class RunningBatch:
    """Rows in one batch over one cache."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.rows: list[RunningRow] = []
        self._state: DecodingState | None = None  # of the rows, where there are some

    @property
    def running(self) -> int:
        """Rows that have not ended."""
        return sum(not row.over for row in self.rows)

    def takes_more(self) -> bool:
        """Whether rows may join now."""
        return self._state is None or self._state.grows

    @torch.inference_mode()
    def admit(self, rows: Sequence[RunningRow]) -> None:
        """Read rows in one forward pass. Those that are classified have their results then, the others a first token.

        Raises
        ------
        HubError
            Something that cannot be activated, or NaN; the rows that were under way go on.
        """
        fresh = RunningBatch(self.host)
        if isinstance(rows[0].prepared.gate, Mixture):
            fresh._run_mixture(rows, rows[0].prepared.gate)
        elif self.host.translates:
            fresh._begin_seq2seq(rows)
        elif self.host.decodes:
            fresh._begin_causal(rows)
        else:
            fresh._classify_with_encoder(rows)
        self._join(fresh)

    @torch.inference_mode()
    def step(self) -> None:
        """One more token for every row."""
        self._compact()
        if self._state is None:
            return
        self._activate(self.rows)
        self._choose(self._state.step(self.host, [row.last for row in self.rows]).float())

    def leave(self) -> list[RunningRow]:
        """Take out the rows, ended or not."""
        rows, self.rows, self._state = self.rows, [], None
        return rows

    # -- reading ---------------------------------------------------------------------------------------------------

    def _begin_causal(self, rows: Sequence[RunningRow]) -> None:
        """Prompts of a causal model: (B, T), padded on the left."""
        host, prepared = self.host, [row.prepared for row in rows]
        self._activate(rows)
        ids, mask = _pad(prepared, host.pad, host.model.device, left=True)
        # Rows that are classified need no cache and no logits: where all are, only the backbone runs.
        going = [i for i, p in enumerate(prepared) if p.generates]
        options: dict[str, Any] = {"use_cache": bool(going)}
        if going:
            options["past_key_values"] = DynamicCache(config=host.model.config)
        options |= host.takes(position_ids=(mask.cumsum(1) - 1).clamp_min(0), logits_to_keep=1)
        # Heads read the last hidden states; beside rows that generate they are what the output layer is given.
        if going:
            with _head_inputs(host) as states:
                out = host.model(input_ids=ids, attention_mask=mask, **options)
        else:
            options.pop("logits_to_keep", None)
            states = [host.backbone(input_ids=ids, attention_mask=mask, **options)]
        self._apply_heads(rows, states[0], mask, last=True)
        if not going:
            return
        self._begin(
            rows, CausalState(options["past_key_values"], mask, prompted=_prompted(host, rows)), out.logits[:, -1]
        )

    def _begin_seq2seq(self, rows: Sequence[RunningRow]) -> None:
        """Texts of an encoder-decoder: (B, S), padded on the right; its encoder reads them this once."""
        self._activate(rows)
        ids, mask = _pad([row.prepared for row in rows], self.host.pad, self.host.model.device, left=False)
        self._begin(rows, *read_by_encoder(self.host, ids, mask, prompted=_prompted(self.host, rows)))

    def _begin(self, rows: Sequence[RunningRow], state: DecodingState, logits: Tensor) -> None:
        """Take rows in that were read, and their first tokens from logits (B, V)."""
        self.rows, self._state = list(rows), state
        self._choose(logits.float())
        self._compact(all_ended=True)

    def _run_mixture(self, rows: Sequence[RunningRow], mixture: Mixture) -> None:
        """Rows of an ensemble, from the first token to the last: its experts fill a batch by themselves."""
        ids, mask = _pad([row.prepared for row in rows], self.host.pad, self.host.model.device, left=True)
        with torch.inference_mode(False), torch.no_grad():
            made, weights = mixture.generate(self.host, ids.clone(), mask.clone(), max(r.prepared.room for r in rows))
        for row, tokens, weight in zip(rows, made, weights, strict=True):
            if row.prepared.request.weights:
                row.prepared = replace(row.prepared, weights=weight)
            for token in tokens:
                if not row.over:
                    row.take(token, ids, self.host.ends)

    def _classify_with_encoder(self, rows: Sequence[RunningRow]) -> None:
        """Texts of an encoder: (B, T), padded on the right."""
        host, prepared = self.host, [row.prepared for row in rows]
        self._activate(rows)
        ids, mask = _pad(prepared, host.pad, host.model.device, left=False)
        options = {}
        if any(p.types is not None for p in prepared):
            options["token_type_ids"] = _types(prepared, ids)
        states = host.backbone(input_ids=ids, attention_mask=mask, **options)
        self._apply_heads(rows, states, mask, last=False)

    def _apply_heads(self, rows: Sequence[RunningRow], output: Any, mask: Tensor, *, last: bool) -> None:
        """Results of the rows that end in a head: rows of one head go through it together."""
        host = self.host
        active = host.runtime.rows
        # Rows whose shares of heads are equal go through them in one call.
        groups: dict[tuple[tuple[float, str], ...], list[int]] = {}
        for i, row in enumerate(rows):
            if not row.prepared.generates:
                expr = active[i if len(active) > 1 else 0]
                known = host.runtime.adapters
                shares = heads_of(expr, known, host.heads.names())
                if len(shares) > 1:  # a router's members may have heads for other labels than the one it answers with
                    shares = [(w, n) for w, n in shares if known[n].labels == row.prepared.target.labels]
                groups.setdefault(tuple(shares), []).append(i)
        # A causal model answers at the end of a text, so only its last place is kept.
        for heads, members in groups.items():
            if not heads:
                raise HubError(f"{rows[members[0]].prepared.target.text} brings no head", hint="see `hub show`")
            at = torch.tensor(members, device=mask.device)
            seen, real = pick(output, at, last=last), mask[at][:, -1:] if last else mask[at]
            parts = [(w, host.heads.logits(host.runtime.adapters[n], seen, real)) for w, n in heads]
            for i, logits in zip(members, blend(parts), strict=True):
                if bool(logits.isnan().any()):
                    rows[i].fail()
                else:
                    rows[i].result = _classified(rows[i].prepared, logits)

    def _activate(self, rows: Sequence[RunningRow]) -> None:
        """Make active what is applied to each row."""
        gate = rows[0].prepared.gate
        with torch.inference_mode(False), torch.no_grad():  # a merge makes an adapter, which outlives this call
            if gate is None:
                self.host.activate([row.prepared.expr for row in rows])
            else:
                self.host.forget()
                gate.router.activate(self.host.model, None)

    # -- decoding --------------------------------------------------------------------------------------------------

    def _choose(self, logits: Tensor) -> None:
        """The next token of each row that goes on, from logits (B, V)."""
        tokens = choose(logits, [None if row.over else row.sampler for row in self.rows])
        for row, token, scores in zip(self.rows, tokens, logits, strict=True):
            if token is None:
                row.fail()
            elif not row.over:
                row.take(token, scores, self.host.ends)

    def _compact(self, *, all_ended: bool = False) -> None:
        """Leave out rows that have ended, once they are half of the batch: what is active is laid out anew then."""
        kept = [i for i, row in enumerate(self.rows) if not row.over]
        if not kept:
            self.leave()
        elif len(kept) < len(self.rows) and (all_ended or 2 * len(kept) <= len(self.rows)):
            assert self._state is not None  # noqa: S101 - there are rows
            if self._state.leaves:
                self._state.keep(kept)
                self.rows = [self.rows[i] for i in kept]

    def _join(self, fresh: RunningBatch) -> None:
        """Put another batch's rows beside these."""
        if not fresh.rows:
            return
        self._compact(all_ended=True)
        if not self.rows:
            self.rows, self._state = fresh.rows, fresh._state
            return
        assert isinstance(self._state, CausalState) and isinstance(fresh._state, CausalState)  # noqa: S101 - see `joins`
        self._state.add(fresh._state)
        self.rows += fresh.rows

    def joins(self, rows: Sequence[RunningRow]) -> bool:
        """Whether these rows can join the ones under way: beside those, and without a prompt before their text."""
        return self._state is None or (self._state.grows and not _prompted(self.host, rows))


def _prompted(host: Host, rows: Sequence[RunningRow]) -> bool:
    """Whether an adapter puts a prompt before the text of some row."""
    adapters = host.runtime.adapters
    names = {name for row in rows for name in row.prepared.expr.refs}
    return any(name in adapters and adapters[name].prompt() is not None for name in names)


@contextmanager
def _head_inputs(host: Host) -> Iterator[list[Any]]:
    """The last hidden states inside a call of the whole model: what its language-modelling head is given."""
    states: list[Any] = []

    def keep(_module: Any, given: tuple[Tensor, ...]) -> None:
        states.append(BaseModelOutputWithPast(last_hidden_state=given[0]))

    hook = host.model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield states
    finally:
        hook.remove()


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


def _classified(prepared: PreparedRow, logits: Tensor) -> Result:
    """Result of a classified row from its logits (classes,)."""
    target, read = prepared.target, len(prepared.ids)
    if target.task == "regress":
        return Result(value=float(logits[0]), weights=prepared.weights, read=read)
    p, order = logits.double().softmax(-1).sort(descending=True, stable=True)
    named = [(target.labels[i], float(q)) for q, i in zip(p.tolist(), order.tolist(), strict=True)]
    return Result(
        label=named[0][0], scores=tuple(named[: prepared.request.scores]), weights=prepared.weights, read=read
    )
