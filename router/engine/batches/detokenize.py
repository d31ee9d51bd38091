"""Tokens to text while they come: no half characters, and nothing after a stop text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

_HALF = "\ufffd"  # what a tokenizer gives for bytes that are no whole character yet
_CONTEXT = 4  # tokens of the prompt that are decoded along: some tokenizers drop a space at the start of a text


class Detokenizer:
    """Text of one continuation.

    >>> words = Detokenizer(tokenizer, prompt_ids, stop=("END",))
    >>> words.push(token)        # the text that has become certain, which may be none
    >>> words.close()            # the rest
    """

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = (), keep: Collection[int] = ()
    ) -> None:
        self._left_out = frozenset(tokenizer.all_special_ids).difference(keep) if keep else None
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = list(prompt[-_CONTEXT:])
        self._from, self._read = 0, len(self._ids)  # ids[from:read] are text already, and decoded along
        self._given = 0
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take the next token; returns the text that is certain now."""
        self._ids.append(token)
        self._take(whole=True)
        return self._give(len(self.text) - self._unsure())

    def close(self) -> str:
        """The text that was held back."""
        if not self.stopped:
            self._take(whole=False)
        return self._give(len(self.text))

    def _take(self, *, whole: bool) -> None:
        before = self._decode(self._ids[self._from : self._read])
        now = self._decode(self._ids[self._from :])
        if len(now) <= len(before) or (whole and now.endswith(_HALF)):
            return
        self._from, self._read = self._read, len(self._ids)
        start = max(0, len(self.text) - max(map(len, self._stop), default=0) + 1)
        self.text += now[len(before) :]
        stops = [place for stop in self._stop if (place := self.text.find(stop, start)) >= 0]
        if stops:
            self.text, self.stopped = self.text[: min(stops)], True

    def _decode(self, ids: Sequence[int]) -> str:
        if self._left_out is not None:  # some special tokens are text
            ids = [token for token in ids if token not in self._left_out]
            return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _unsure(self) -> int:
        """Length of the end of the text that may yet become a stop text."""
        if self.stopped:
            return 0
        longest = max(map(len, self._stop), default=1) - 1
        ends = range(min(longest, len(self.text)), 0, -1)
        return next((n for n in ends if any(stop.startswith(self.text[-n:]) for stop in self._stop)), 0)

    def _give(self, end: int) -> str:
        new = self.text[self._given : end]
        self._given = max(self._given, end)
        return new
