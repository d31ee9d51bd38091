"""What a model remembers of the tokens before, under the name its family has for it, and how many those are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compose.errors import KindError

CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states", "cache")


def cache_of(values: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The name and the cache among the arguments or the outputs of a call, None if there is none."""
    return next(((name, values[name]) for name in CACHES if values.get(name) is not None), None)


def tokens_before(arguments: Mapping[str, Any]) -> int | None:
    """How many tokens the cache of a call holds; None where it holds some, and keeps a state and no count.

    Raises
    ------
    KindError
        A cache that does not tell whether it holds any.
    """
    found = cache_of(arguments)
    if found is None:
        return 0
    name, cache = found
    if hasattr(cache, "seqlen_offset"):  # xLSTM
        return int(cache.seqlen_offset)
    if hasattr(cache, "get_seq_length"):
        try:
            return int(cache.get_seq_length())
        except ValueError:  # of recurrent layers alone
            return None if cache.has_previous_state() else 0
    if name == "state" and isinstance(cache, list | tuple) and all(isinstance(s, Tensor) for s in cache):  # RWKV
        return None
    raise KindError(
        f"a prompt cannot tell how many tokens {name!r} holds, and whether it is among them",
        hint="leave the cache out: use_cache=False",
    )
