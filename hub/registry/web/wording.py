"""Figures and names as people read them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any


def size(count: int) -> str:
    """``1.5 MiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def number(count: int) -> str:
    """``1.3 M``: a count of parameters, adapters, ..."""
    value = float(count)
    for unit in ("", " k", " M", " B"):
        if value < 1000 or unit == " B":
            break
        value /= 1000
    return f"{count}" if not unit else f"{value:.1f}{unit}"


def figure(value: float) -> str:
    """A measured value: four significant digits, no exponent where it can be read without."""
    text = f"{value:.4g}"
    return f"{value:.0f}" if "e" in text and abs(value) < 1e7 and abs(value) >= 1 else text


def day(moment: str | float) -> str:
    """``21 Nov 2026`` of an ISO time or of seconds."""
    if isinstance(moment, str):
        date = datetime.fromisoformat(moment.replace("Z", "+00:00"))
    else:
        date = datetime.fromtimestamp(moment, timezone.utc)
    return f"{date.day} {date:%b %Y}"


def short(digest: str) -> str:
    """First 12 digits of a digest or commit id."""
    return digest.removeprefix("sha256:")[:12]


_WORDS = {"causal_lm": "causal LM", "masked_lm": "masked LM", "seq2seq": "sequence to sequence"}


def words(name: str) -> str:
    """``token_classification`` as ``token classification``."""
    return _WORDS.get(name, name.replace("_", " "))


def counted(count: int, noun: str) -> str:
    """``1 file``, ``3 files``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


FILTERS: dict[str, Callable[..., Any]] = {
    "size": size,
    "number": number,
    "figure": figure,
    "day": day,
    "short": short,
    "words": words,
    "counted": counted,
}
