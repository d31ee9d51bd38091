"""Remotes that have a name: ``remotes.json`` in HUB_HOME, name -> URL. It never holds credentials."""

from __future__ import annotations

import re
from pathlib import Path

from hub.errors import Conflict, NotFound, UsageError, suggest
from hub.project.json_map import JsonMap
from hub.remotes.base import Remote, from_url
from hub.store import default_root

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\Z")


class Remotes:
    """The named remotes of a home.

    Parameters
    ----------
    home
        The directory; HUB_HOME where it is None.
    """

    def __init__(self, home: Path | None = None) -> None:
        mend = "mend or remove the file, then add the remotes again"
        self._table = JsonMap((home or default_root()) / "remotes.json", holds="names to URLs", mend=mend)

    @property
    def path(self) -> Path:
        """The file."""
        return self._table.path

    def all(self) -> dict[str, str]:
        """Name -> URL, sorted by name. Raises StoreError where the file is not what this class writes."""
        return self._table.read()

    def add(self, name: str, url: str, *, replace: bool = False) -> str:
        """Give a URL a name; returns the URL as it is kept (a path is made absolute).

        Raises
        ------
        UsageError
            A bad name, an unknown scheme, or a URL with credentials.
        Conflict
            The name stands for another URL, and `replace` is not given.
        """
        if not _NAME.match(name):
            raise UsageError(
                f"{name!r} is not a name of a remote: lower-case letters, digits, '-' and '_'", hint="try 'team'"
            )
        from_url(url)
        address = url if "://" in url else str(Path(url).expanduser().absolute())
        with self._table.changing() as urls:
            if urls.get(name, address) != address and not replace:
                raise Conflict(
                    f"the remote {name} is {urls[name]}", hint=f"hub remote add {name} {address} --replace moves it"
                )
            urls[name] = address
        return address

    def remove(self, name: str) -> str:
        """Forget a name; returns its URL. What is there stays there. Raises NotFound."""
        with self._table.changing() as urls:
            if name not in urls:
                raise _unknown(name, urls)
            return urls.pop(name)

    def url(self, text: str) -> str:
        """URL that a text stands for: itself where it is a URL or a path, else that of the remote of this name.

        Raises
        ------
        NotFound
            A plain word that is neither a remote nor a directory, with did-you-mean.
        """
        known = self.all()
        if text in known:
            return known[text]
        if "://" in text or "/" in text or text.startswith((".", "~")) or Path(text).is_dir():
            return text
        raise _unknown(text, known)

    def open(self, text: str) -> Remote:
        """Remote of a name, a URL or a path."""
        return from_url(self.url(text))


def _unknown(name: str, known: dict[str, str]) -> NotFound:
    hint = suggest(name, known) or f"`hub remote add {name} URL` makes it; a directory is written ./{name}"
    return NotFound(f"there is no remote {name!r}", hint=hint)
