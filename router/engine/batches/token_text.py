"""The bytes of single tokens: a token may be part of a character."""

from __future__ import annotations

import re
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how sentencepiece names the tokens that are single bytes
_BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}  # how byte-level BPE writes them
_MARK = "▁"  # sentencepiece's space


class TokenText:
    """Bytes of a tokenizer's tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        shown = "".join(tokenizer.convert_ids_to_tokens(tokenizer(" é", add_special_tokens=False).input_ids))
        self._by_bytes, self._marked = "Ã©" in shown, _MARK in shown

    def bytes(self, token: int) -> bytes:
        """What a token adds to a text."""
        written = str(self._tokenizer.convert_ids_to_tokens(token) or "")
        added = token in self._tokenizer.added_tokens_decoder
        if not added and (byte := _BYTE.fullmatch(written)):
            return bytes([int(byte[1], 16)])
        if not added and self._by_bytes and all(letter in _BYTES for letter in written):
            return bytes(_BYTES[letter] for letter in written)
        if not added and self._marked:
            return written.replace(_MARK, " ").encode()
        return str(self._tokenizer.decode([token])).encode()
