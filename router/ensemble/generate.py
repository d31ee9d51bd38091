"""Generation by an ensemble: key-value caches side by side, one mixture, one token for all experts of a text."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

import compose
from compose.expr.tree import IDENTITY
from hub.errors import UsageError
from router.dispatch import row_expressions
from router.ensemble.belief import Belief
from router.ensemble.experts import Member, Reader, active, checked

_SETTLED = 8  # tokens over which weights that hardly move have settled


@dataclass(frozen=True)
class Generated:
    """Continuations of B prompts.

    Attributes
    ----------
    sequences : (B, T + N) prompts and new tokens, padded on the right after the end of a text.
    log_probs : (B, N) float64, log of the mixture's probability of each new token, in nats; 0 after the end.
    posterior : (B, N, E) float64, weights used for each new token; 0 for dropped experts.
    rows : rows computed at each of the N steps; E x B until experts are dropped, B once they are merged.
    """

    sequences: Tensor
    log_probs: Tensor
    posterior: Tensor
    rows: tuple[int, ...]


def generate(
    model: PreTrainedModel,
    members: Sequence[Member],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    start: Callable[[int], Belief],
    prefix: int | None,
    epsilon: float,
    collapse: float,
    max_logits: int,
    options: Mapping[str, Any],
) -> Generated:
    """Continue prompts by the mixture of the members; see `Ensemble.generate`. `start` is what is believed of B texts.

    transformers' own `generate` prepares processors, stopping criteria and special tokens; the loop is here.
    """
    if not 0.0 <= epsilon < 1.0 / len(members):
        raise UsageError(f"epsilon is {epsilon}; it must lie in [0, 1/{len(members)})", hint="0 drops no expert")
    if not 0.0 <= collapse <= 1.0:
        raise UsageError(f"collapse is {collapse}, not in [0, 1]", hint="0 never merges; 0.01 once weights stand still")
    if options.get("num_beams", 1) != 1:
        raise UsageError("an ensemble does not search with beams", hint="num_beams=1, with or without do_sample")
    ids, mask = checked(model, input_ids, attention_mask)
    state = _DecodingState(model, members, start, prefix, epsilon, collapse, max_logits)
    settings = dict(options)
    streamer = settings.pop("streamer", None)

    def loop(
        model: PreTrainedModel,  # noqa: ARG001
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor:
        given = model_kwargs.get("attention_mask")
        return _decode(state, input_ids, given, logits_processor, stopping_criteria, generation_config, streamer)

    with active(model, members):
        sequences = model.generate(ids, attention_mask=mask, custom_generate=loop, **settings)
    return Generated(sequences, torch.stack(state.log_probs, 1), torch.stack(state.weights, 1), tuple(state.rows))


@torch.no_grad()
def _decode(
    state: _DecodingState,
    ids: Tensor,
    mask: Tensor | None,
    processors: Any,
    criteria: Any,
    config: GenerationConfig,
    streamer: Any,
) -> Tensor:
    """Sample until every text has ended: prompts (B, T) to sequences (B, T + N)."""
    pad = config._pad_token_tensor
    running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    if streamer is not None:
        streamer.put(ids.cpu())
    log_probs = state.prefill(ids, torch.ones_like(ids) if mask is None else mask)  # (E, B, V)
    while True:
        mixed = state.mix(log_probs)
        scores = processors(ids, mixed.float())
        sampled = config.do_sample
        tokens = torch.multinomial(scores.softmax(-1), 1).squeeze(1) if sampled else scores.argmax(-1)
        tokens = torch.where(running, tokens, tokens if pad is None else pad)
        state.observe(tokens, mixed, log_probs, running)
        ids = torch.cat([ids, tokens[:, None]], 1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        running = running & ~criteria(ids, scores)
        if not bool(running.any()):
            break
        log_probs = state.merged(ids) if state.settled(running) else state.forward(tokens)
    if streamer is not None:
        streamer.end()
    return ids


class _DecodingState:
    """Caches, what is believed, and which (expert, text) rows are still computed."""

    def __init__(
        self,
        model: PreTrainedModel,
        members: Sequence[Member],
        start: Callable[[int], Belief],
        prefix: int | None,
        epsilon: float,
        collapse: float,
        max_logits: int,
    ) -> None:
        self.model, self.members, self.start, self.max_logits = model, list(members), start, max_logits
        self.prefix, self.epsilon, self.collapse = prefix, epsilon, collapse
        self.is_merged = False
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.log_probs: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.rows: list[int] = []

    def prefill(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read the prompts: fills the cache, weighs the experts by them, returns log p of the next token (E, B, V)."""
        batch, experts = len(ids), len(self.members)
        self.cache = DynamicCache(config=self.model.config)
        self.mask = mask.long()
        row = torch.arange(experts * batch, device=ids.device)
        self.expert, self.text = row // batch, row % batch
        # The prompt is read in segments over one cache, so that E x B x T x V logits are never alive at once.
        reader = Reader(self.model, ids, self.mask)
        vocabulary = int(self.model.get_output_embeddings().weight.shape[0])
        segment = max(1, self.max_logits // (experts * batch * vocabulary))
        read, last = zip(*reader.pieces(experts, segment, self.cache), strict=True)
        # What the experts said of the prompt itself is the evidence for their first weights.
        valid = (self.mask[:, 1:] & self.mask[:, :-1]).bool()
        values = torch.cat(read, -1).permute(1, 2, 0)  # (B, T-1, E)
        heard = valid if self.prefix is None else valid & (valid.cumsum(1) <= self.prefix)
        self.seen = valid.sum(1)  # (B,): predictions of each text so far
        _, self.belief = self.start(batch).read(values, heard)
        following: Tensor = last[-1].log_softmax(-1)
        return following

    def mix(self, log_probs: Tensor) -> Tensor:
        """Log of the mixture (B, V) under the present weights; drops the experts that no longer count."""
        if self.is_merged:
            self.rows.append(len(self.text))
            return log_probs[0].double()
        self.log_pi = self.belief.log_weights  # (B, E)
        self.rows.append(len(self.expert))
        if self.epsilon > 0.0 or bool(self.log_pi.isneginf().any()):
            self._drop(self.log_pi.exp() < self.epsilon)
        return torch.logsumexp(self.log_pi.T.unsqueeze(-1) + log_probs.double(), 0)

    def _drop(self, light: Tensor) -> None:
        """Stop computing the rows of experts under epsilon, for good; the others share their weight."""
        self.belief = self.belief.without(light)
        self.log_pi = self.log_pi.masked_fill(light, -torch.inf).log_softmax(-1)
        kept = (~self.log_pi.isneginf()[self.text, self.expert]).nonzero().flatten()
        if len(kept) < len(self.expert):
            self.expert, self.text = self.expert[kept], self.text[kept]
            self.cache.batch_select_indices(kept)
            compose.activate(self.model, [self.members[e] for e in self.expert.tolist()])

    def observe(self, tokens: Tensor, mixed: Tensor, log_probs: Tensor, running: Tensor) -> None:
        """Record the chosen tokens (B,) and what they tell of the texts that still run."""
        chosen = mixed.gather(-1, tokens[:, None]).squeeze(1)
        self.log_probs.append(chosen.masked_fill(~running, 0.0))
        self.weights.append(self.log_pi.exp())
        if self.is_merged:
            return
        heard = running if self.prefix is None else running & (self.seen < self.prefix)
        self.seen = self.seen + running.long()
        seen = log_probs.gather(-1, tokens.expand(len(self.members), -1).unsqueeze(-1)).squeeze(-1).T  # (B, E)
        _, self.belief = self.belief.read(seen.unsqueeze(1), heard.unsqueeze(1))

    def settled(self, running: Tensor) -> bool:
        """Whether the weights of no running text (B,) have moved over the last tokens, so that they can be merged."""
        if self.is_merged or self.collapse == 0.0 or len(self.weights) <= _SETTLED:
            return False
        moved = (self.weights[-1] - self.weights[-1 - _SETTLED]).abs().sum(-1) / 2  # total variation (B,)
        return bool((moved[running] <= self.collapse).all())

    def merged(self, ids: Tensor) -> Tensor:
        """Give each text the one adapter of its weights and read it anew (B, T); log p of the next token (1, B, V)."""
        self.is_merged = True
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        # No expert's cache is that of the merged adapter, so the text is read anew.
        members = [IDENTITY if member is None else member for member in self.members]
        compose.activate(self.model, row_expressions(members, self.log_pi.exp()))
        self.cache = DynamicCache(config=self.model.config)
        self.text = torch.arange(len(ids), device=ids.device)
        self.expert = torch.zeros_like(self.text)
        vocabulary = int(self.model.get_output_embeddings().weight.shape[0])
        segment = max(1, self.max_logits // (len(ids) * vocabulary))
        for _, last in Reader(self.model, ids, self.mask).pieces(1, segment, self.cache):
            following = last
        log_probs: Tensor = following.log_softmax(-1)
        return log_probs

    def forward(self, tokens: Tensor) -> Tensor:
        """One step of every remaining row; log p (E, B, V), zeros for rows that were dropped (their weight is 0)."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        options: dict[str, Any] = {"past_key_values": self.cache, "use_cache": True}
        if not bool(self.mask.all()):
            options["attention_mask"] = self.mask[self.text]
            if self.takes_positions:
                options["position_ids"] = (self.mask.sum(1) - 1)[self.text, None]
        logits = self.model(input_ids=tokens[self.text, None], **options).logits[:, -1].float()
        full: Tensor = logits.new_zeros(1 if self.is_merged else len(self.members), len(tokens), logits.shape[-1])
        full[self.expert, self.text] = logits.log_softmax(-1)
        return full
