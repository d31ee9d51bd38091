"""The HubError tree: each error names the thing, the place and the next command."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class HubError(Exception):
    """Something the user can act on.

    Parameters
    ----------
    message
        One clear sentence; it is what ``str(error)`` gives.
    ref, digest, path
        What the error is about, where that is known.
    hint
        The next command or step, as a sentence.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        ref: object | None = None,
        digest: str | None = None,
        path: str | Path | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.ref = None if ref is None else str(ref)
        self.digest = digest
        self.path = None if path is None else str(path)
        self.hint = hint

    def __str__(self) -> str:
        return self.message

    def as_dict(self) -> dict[str, str]:
        """Fields that are set, for ``--json``."""
        fields = {
            "error": type(self).__name__,
            "message": self.message,
            "ref": self.ref,
            "digest": self.digest,
            "path": self.path,
            "hint": self.hint,
        }
        return {key: value for key, value in fields.items() if value is not None}


class UsageError(HubError):
    """The command or call was written wrongly; nothing was tried."""

    exit_code = 2


class RefError(UsageError):
    """A text that is not an adapter ref."""


class NotFound(HubError):
    """No artifact, version, alias, blob or file of that name."""


class Conflict(HubError):
    """What is there differs from what the caller expects: an immutable version, a moved alias."""


class ManifestError(HubError):
    """A manifest that cannot be read; the message shows where."""


class IntegrityError(HubError):
    """Bytes that are not the bytes they claim to be."""


class GateError(HubError):
    """An artifact that must not be published or admitted: unsafe file, NaN, missing tensor, absurd size."""


class BaseMismatch(HubError):
    """An adapter made for another base model."""


class StoreError(HubError):
    """The store itself: no permission, read-only, full, damaged, locked."""


class RemoteError(HubError):
    """A remote that cannot be reached or answers wrongly."""


class HubWarning(UserWarning):
    """Something the user should know, though it stops nothing; the ``hub`` command prints it as a sentence."""


@contextmanager
def hinted(hint: str, *kinds: type[HubError]) -> Iterator[None]:
    """Give errors of these kinds that come without a hint the next step that this place knows."""
    try:
        yield
    except kinds as error:
        error.hint = error.hint or hint
        raise


def did_you_mean(word: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """Close matches of a word among known ones, best first (`difflib`, cutoff 0.6)."""
    from difflib import get_close_matches

    return get_close_matches(word, sorted(set(known)), n=count, cutoff=0.6)


def suggest(word: str, known: Iterable[str]) -> str | None:
    """Word a did-you-mean hint, or None where nothing is close."""
    close = did_you_mean(word, known)
    return f"did you mean {' or '.join(close)}?" if close else None
