"""Canonical JSON (RFC 8785), strict reading of foreign JSON, and sha256 digests of bytes."""

from __future__ import annotations

import hashlib
import json
from typing import Any, NoReturn

from hub.errors import ManifestError

MAX_JSON = 16 * 2**20  # bytes; a manifest of 10,000 tensors takes about 2 MiB


def digest(data: bytes) -> str:
    """``sha256:`` and the hex digest of the bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def dumps(value: object) -> bytes:
    """RFC 8785 bytes of a JSON value: sorted keys, no spaces, shortest numbers. Raises ManifestError."""
    import rfc8785

    try:
        return rfc8785.dumps(value)  # type: ignore[arg-type]
    except (rfc8785.CanonicalizationError, UnicodeEncodeError, RecursionError) as error:
        raise ManifestError(f"not representable as canonical JSON: {error}") from error


def loads(data: bytes, *, what: str, limit: int = MAX_JSON) -> Any:
    """Read JSON from outside: size capped, no duplicate keys, no NaN, no endless nesting.

    Parameters
    ----------
    data
        UTF-8 bytes.
    what
        What is read, for the message (a path or a name).
    limit
        The most bytes accepted.

    Raises
    ------
    ManifestError
        Naming line and column where the text stops being JSON.
    """
    if len(data) > limit:
        raise ManifestError(f"{what} has {len(data)} bytes; at most {limit} are read")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise ManifestError(f"{what} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"{what} is not UTF-8: byte {error.start}: {error.reason}") from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise ManifestError(f"{what} is not acceptable JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} stands twice in one object")
    return value


def _integer(text: str) -> int | float:
    # JSON numbers are doubles (I-JSON, RFC 7493). The canonical form of 5.1e16 is 51000000000000000, and must come
    # back as it was; an integer that would be rounded on the way is refused.
    value = int(text)
    if abs(value) < 2**53:
        return value
    if int(float(value)) != value and dumps(float(value)) != text.encode():
        raise ValueError(f"{text[:40]} is an integer that no double holds exactly")
    return float(value)


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
