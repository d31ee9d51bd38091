"""Sizes as people write them."""

from __future__ import annotations

import re

from hub.errors import UsageError


def parse_size(text: str) -> int:
    """Bytes of "500MiB", "20G" or "1024". Raises UsageError for anything else and for nothing."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)I?B?", text.strip().upper())
    size = int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")) if match else 0
    if not size:
        raise UsageError(f"{text!r} is not a size", hint="write 500MiB or 20GiB")
    return size
