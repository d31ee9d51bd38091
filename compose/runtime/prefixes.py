"""Prefix atoms: trained keys and values in front of a self-attention's own, per row and weighted.

They enter through transformers' attention interface, so the model's code and its cache stay untouched: the prefix is
not in the cache, and cached decoding equals uncached. A weight w on a prefix adds log w to its attention scores, so
w = 1 is the prefix alone, w = 0 is none, and halves of the same prefix add up to one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from compose.atoms import Prefix
from compose.errors import KindError
from compose.runtime.prompts import repeat

OURS = {"sdpa": "moduloom_sdpa", "eager": "moduloom_eager"}


@dataclass(frozen=True)
class PrefixState:
    """What one attention module prepends: key, value (R, kv_heads, n, head_dim), log_weight (R, 1 or T, n).

    ``whole`` says that every weight is one or zero, ``even`` that every one is one, ``past`` tells how many tokens the
    cache holds, ``shift`` (R,) how many places each row's text is moved on, and ``bias_owner`` is the module that knows
    the relative position bias (T5 keeps that of a stack in its first layer). ``ahead`` (R, n) is how far before the
    text a token stands that slides out of a window, 0 for one that does not; ``places`` gives those of the q tokens
    of a call, (B or 1, q).
    """

    key: Tensor
    value: Tensor
    log_weight: Tensor
    whole: bool
    even: bool
    past: Callable[[], int]
    shift: Tensor
    bias_owner: nn.Module | None = None
    ahead: Tensor | None = None
    places: Callable[[int], Tensor] = lambda q: torch.arange(q)[None]

    @property
    def length(self) -> int:
        """The longest row's n."""
        return int(self.key.shape[2])

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        # A copy of a model stacks its own prefixes, at its first call.
        return None


def stack_prefixes(
    rows: Sequence[Sequence[tuple[float | Tensor, Prefix]]],
    *,
    past: Callable[[], int] = lambda: 0,
    places: Callable[[int], Tensor] = lambda q: torch.arange(q)[None],
    bias_owner: nn.Module | None = None,
) -> PrefixState:
    """Lay out each row's weighted prefixes end to end, right-aligned in the longest row's n; the rest weighs zero."""
    lengths = [sum(p.key.shape[0] for _, p in row) for row in rows]
    n = max(lengths)
    keys, values, logs = [], [], []
    # Weights that differ from token to token need a row of log weights for each token, others one for all.
    times = max((w.shape[-1] for row in rows for w, _ in row if isinstance(w, Tensor) and w.dim()), default=1)
    sample = next(p for row in rows for _, p in row)
    heads, width = sample.key.shape[1:]
    device = sample.key.device
    for row, length in zip(rows, lengths, strict=True):
        # The filling comes first and weighs log 0: a row's own tokens stand right before its text.
        pad = sample.key.new_zeros(n - length, heads, width)
        keys.append(torch.cat([pad, *(p.key for _, p in row)]))
        values.append(torch.cat([pad, *(p.value for _, p in row)]))
        log = [torch.full((times, n - length), -torch.inf, device=device)]
        for w, p in row:
            weight = torch.as_tensor(w, dtype=torch.float32, device=device)
            if bool((weight < 0).any()):
                raise KindError("a prefix cannot have a negative weight: attention scores have no negative share")
            log.append(weight.log().reshape(-1, 1).expand(times, p.key.shape[0]))
        logs.append(torch.cat(log, dim=1))
    log_weight = torch.stack(logs)
    # Where each token is there or not, a mask of booleans does; where all are there, none is needed.
    whole = bool(((log_weight == 0) | log_weight.isneginf()).all())
    key, value = torch.stack(keys).transpose(1, 2), torch.stack(values).transpose(1, 2)
    # A text is moved on by the tokens of those prefixes that count as tokens, however little they weigh.
    there = [sum(_there(w) * p.key.shape[0] for w, p in row if p.moves) for row in rows]
    shift = torch.tensor(there, device=device)
    even = not bool(log_weight.any())
    ahead = torch.zeros(len(rows), n, dtype=torch.long, device=device)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        sliding = torch.tensor([p.slides for _, p in row for _ in range(len(p.key))], dtype=torch.bool, device=device)
        ahead[i, n - length :] = torch.arange(length, 0, -1, device=device) * sliding
    slides = any(p.slides for row in rows for _, p in row)
    return PrefixState(key, value, log_weight, whole, even, past, shift, bias_owner, ahead if slides else None, places)


def _there(weight: float | Tensor) -> bool:
    return bool(weight.any()) if isinstance(weight, Tensor) else weight != 0


def takes_prefix(module: nn.Module) -> bool:
    """Whether an attention module goes through transformers' attention interface, where a prefix comes in."""
    return hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS")


def use_interface(model: PreTrainedModel, on: bool) -> None:
    """Switch every attention config of the model to our wrappers of sdpa and eager attention, or back."""
    back = {v: k for k, v in OURS.items()}
    if not on and model.config._attn_implementation not in back:
        return
    configs = {
        id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")
    }
    for config in configs.values():
        current = config._attn_implementation
        name = OURS.get(current, current) if on else back.get(current, current)
        if on and name not in back:
            raise KindError(
                f"prefixes need sdpa or eager attention, and this model runs {current!r}",
                hint='load the base with attn_implementation="sdpa"',
            )
        if name != current:
            config._attn_implementation = name


def _with_prefix(
    inner: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> Any:
    place = module.__dict__.get("moduloom_prefix")
    state = None if place is None else cast("PrefixState | None", place())
    if state is None:
        return inner(module, query, key, value, attention_mask, **options)
    batch = query.shape[0]
    log = _log_weights(state, query, options.get("sliding_window", getattr(module, "sliding_window", None)))
    bias = options.get("position_bias")
    if inner is sdpa_attention_forward and bias is None and _is_decoding(query, attention_mask, state, options):
        return _decode(state, log, query, key, value, attention_mask, options.get("scaling")), None
    if isinstance(bias, Tensor):
        options["position_bias"] = torch.cat([_virtual_bias(state, bias), bias], dim=-1)
    mask = _extend_mask(_filled(attention_mask, module, query, key, options), state, log, query)
    if mask.dtype == torch.bool and inner is not sdpa_attention_forward:  # eager attention adds its mask
        mask = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    key = torch.cat([repeat(state.key, batch).to(key.dtype), key], dim=2)
    value = torch.cat([repeat(state.value, batch).to(value.dtype), value], dim=2)
    options["is_causal"] = False
    return inner(module, query, key, value, mask, **options)


def _is_decoding(query: Tensor, mask: Tensor | None, state: PrefixState, options: dict[str, Any]) -> bool:
    """Whether :func:`_decode` can do this call. In half precision a fused kernel is better than its parts."""
    one_query = query.shape[2] == 1 and (mask is None or mask.shape[1] == 1) and state.log_weight.shape[1] == 1
    return one_query and query.dtype == torch.float32 and not options.get("dropout")


def _decode(
    state: PrefixState,
    log: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
) -> Tensor:
    """Attention of one query a row, (B, 1, H, head_dim), to prefix and cache apart: neither is copied."""
    batch, heads, _, width = query.shape
    scaled = query * (width**-0.5 if scaling is None else scaling)
    scaled = scaled.reshape(batch, key.shape[1], -1, width)  # (B, K, G, d): the queries that share a key
    own_key, own_value = repeat(state.key, batch).to(key.dtype), repeat(state.value, batch).to(value.dtype)
    own = scaled @ own_key.transpose(2, 3)  # (B, K, G, n)
    own = own if state.even and log is state.log_weight else own + repeat(log, batch)[:, None]
    text = scaled @ key.transpose(2, 3)  # (B, K, G, T)
    if mask is not None:
        text = text.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else text + mask
    shares = torch.cat([own, text], dim=-1).softmax(-1)
    out = shares[..., : state.length] @ own_value + shares[..., state.length :] @ value
    return out.reshape(batch, heads, 1, width).transpose(1, 2)


def _filled(mask: Tensor | None, module: nn.Module, query: Tensor, key: Tensor, options: dict[str, Any]) -> Tensor:
    """The base's mask as a tensor (bool or additive float): where transformers leaves it out, causality is implied."""
    if mask is not None:
        return mask
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    q, k = query.shape[2], key.shape[2]
    full = torch.ones(q, k, dtype=torch.bool, device=query.device)
    return (full.tril(k - q) if causal and q > 1 else full)[None, None]


def _log_weights(state: PrefixState, query: Tensor, window: int | None) -> Tensor:
    """Log weights (R or B, 1 or q, n) of the virtual tokens for these queries, -inf for those a window has left.

    A token that stands a places before the text is seen by the text's t-th (from 0) as long as a + t < window.
    """
    log = state.log_weight
    if state.ahead is None or window is None:
        return log
    batch, length = query.shape[0], query.shape[2]
    ahead = repeat(state.ahead, batch)[:, None]  # (B, 1, n)
    gone = (ahead > 0) & (ahead + state.places(length).to(ahead.device)[..., None] >= window)  # (B, q, n)
    return repeat(log, batch).masked_fill(gone, -torch.inf) if log.shape[1] in (1, length) else log


def _extend_mask(mask: Tensor, state: PrefixState, log: Tensor, query: Tensor) -> Tensor:
    """(B, 1, q, n + k): the virtual tokens' log weights in front of the base's mask."""
    batch, length = query.shape[0], query.shape[2]
    if log.shape[1] not in (1, length):
        raise KindError(
            f"weights were given for {log.shape[1]} tokens a row, and {length} come here",
            hint="activate again with weights for the tokens of this call",
        )
    mask = mask.expand(batch, mask.shape[1], length, mask.shape[-1])
    log = repeat(log, batch)[:, None].expand(batch, mask.shape[1], length, state.length)
    if mask.dtype == torch.bool and state.whole:
        return torch.cat([log == 0, mask], dim=-1)
    lowest = torch.finfo(query.dtype).min
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, lowest)
    return torch.cat([log.clamp_min(lowest).to(query.dtype), mask.to(query.dtype)], dim=-1)


def _virtual_bias(state: PrefixState, bias: Tensor) -> Tensor:
    """Relative position bias (1, H, q, n) of n tokens that stand before everything (T5)."""
    length, n, owner = bias.shape[2], state.length, cast("Any", state.bias_owner)
    if owner is None:
        return bias.new_zeros(*bias.shape[:3], n)
    return cast("Tensor", owner.compute_bias(length, n, device=bias.device, past_seen_tokens=state.past() + n))


def bias_owner(model: nn.Module, path: str) -> nn.Module | None:
    """The attention module that holds the relative position bias for the one at ``path``, if its family has one."""
    if not hasattr(model.get_submodule(path), "has_relative_attention_bias"):
        return None
    stem = path.split(".block.", maxsplit=1)[0] + "."
    stack = (m for p, m in model.named_modules() if p.startswith(stem) and hasattr(m, "relative_attention_bias"))
    return next(stack, None)


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    return _with_prefix(sdpa_attention_forward, module, query, key, value, attention_mask, **options)


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    # Each modeling file has its own eager function: the one transformers would have taken by default.
    inner = sys.modules[type(module).__module__].eager_attention_forward
    return _with_prefix(inner, module, query, key, value, attention_mask, **options)


def _whole_sdpa_mask(*args: Any, **options: Any) -> Tensor | None:
    """Transformers' mask, not left out but for a step of decoding: the prefix has to be put before it."""
    if options.get("q_length") != 1:
        options.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return cast("Tensor | None", sdpa_mask(*args, **options))


def _whole_eager_mask(*args: Any, **options: Any) -> Tensor | None:
    options.update(allow_is_bidirectional_skip=False)
    return cast("Tensor | None", eager_mask(*args, **options))


AttentionInterface.register(OURS["sdpa"], _sdpa)
AttentionInterface.register(OURS["eager"], _eager)
AttentionMaskInterface.register(OURS["sdpa"], _whole_sdpa_mask)
AttentionMaskInterface.register(OURS["eager"], _whole_eager_mask)
