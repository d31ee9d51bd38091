"""Remotes that have a name: ``remotes.json`` in HUB_HOME, name -> URL. It never holds credentials."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hub.errors import Conflict, HubError, NotFound, StoreError, UsageError, suggest
from hub.io import canonical_json as canonical
from hub.io.disk import disk_errors
from hub.io.files import atomic_write, read_capped
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
        self.path = (home or default_root()) / "remotes.json"

    def all(self) -> dict[str, str]:
        """Name -> URL, sorted by name. Raises StoreError where the file is not what this class writes."""
        if not self.path.exists():
            return {}
        try:
            urls = canonical.loads(read_capped(self.path, 2**20), what=str(self.path))
            if not isinstance(urls, dict) or not all(isinstance(url, str) for url in urls.values()):
                raise StoreError(f"{self.path} does not map names to URLs", path=self.path)
        except HubError as error:
            hint = "mend or remove the file, then add the remotes again"
            raise StoreError(error.message, path=self.path, hint=hint) from error
        return dict(sorted(urls.items()))

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
        with self._changing() as urls:
            if urls.get(name, address) != address and not replace:
                raise Conflict(
                    f"the remote {name} is {urls[name]}", hint=f"hub remote add {name} {address} --replace moves it"
                )
            urls[name] = address
        return address

    def remove(self, name: str) -> str:
        """Forget a name; returns its URL. What is there stays there. Raises NotFound."""
        with self._changing() as urls:
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

    @contextmanager
    def _changing(self) -> Iterator[dict[str, str]]:
        """Read, change and write under a lock, so that two of us do not undo each other."""
        from filelock import FileLock

        with disk_errors(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_name(".remotes.lock"), timeout=30):
                urls = self.all()
                yield urls
                atomic_write(self.path, json.dumps(urls, indent=2, sort_keys=True).encode() + b"\n")


def _unknown(name: str, known: dict[str, str]) -> NotFound:
    hint = suggest(name, known) or f"`hub remote add {name} URL` makes it; a directory is written ./{name}"
    return NotFound(f"there is no remote {name!r}", hint=hint)
