"""Who is calling, and which namespaces are theirs: access tokens, of which only hashes are kept.

A token is 256 random bits, so one plain sha256 is enough to keep it secret: there is no password to guess. The
file is read again whenever it changes, so a revoked token is dead at once. Example of a file::

    {"anonymous": true, "tokens": [{"name": "ci", "sha256": "...", "read": ["*"], "write": ["acme"]}]}
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import AfterValidator, AwareDatetime, StringConstraints

from hub.errors import ManifestError, NotFound, RefError, StoreError, UsageError, suggest
from hub.io import canonical_json as canonical
from hub.io.files import atomic_write, read_capped
from hub.manifest import Record, validate
from hub.ref import DEFAULT_NAMESPACE, check_name, name_key
from hub.registry.errors import ApiError

PREFIX = "mlm_"
EVERYTHING = "*"
MAX_FILE = 2**20  # bytes


def _check_scope(text: str) -> str:
    try:
        return text if text == EVERYTHING else check_name(text, what="namespace")
    except RefError as error:
        raise ValueError(error.message) from error


Scope = Annotated[str, AfterValidator(_check_scope)]


class Token(Record):
    """One token: its name, the sha256 of its text, and the namespaces it may read and write (``*``: all)."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    read: tuple[Scope, ...] = ()
    write: tuple[Scope, ...] = ()
    created: AwareDatetime | None = None


class TokenFile(Record):
    """The file: its tokens, and whether callers without one may read public repositories."""

    anonymous: bool = True
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes
    ----------
    name
        Of the token; None for a caller without one.
    read, write
        Namespaces whose private repositories may be read, and whose repositories may be changed.
    public
        Whether public repositories may be read.
    """

    name: str | None
    read: frozenset[str] = frozenset()
    write: frozenset[str] = frozenset()
    public: bool = True

    def may_read(self, namespace: str) -> bool:
        """Whether private repositories of a namespace are theirs to read; who may write may read."""
        return _among(namespace, self.read | self.write)

    def may_write(self, namespace: str) -> bool:
        """Whether repositories of a namespace are theirs to change."""
        return _among(namespace, self.write)

    @property
    def namespaces(self) -> list[str]:
        """Namespaces they own by name, sorted."""
        return sorted(self.write - {EVERYTHING})

    @property
    def home(self) -> str:
        """Namespace of a repository that is named without one."""
        return next(iter(self.namespaces), DEFAULT_NAMESPACE)

    @property
    def anonymous(self) -> bool:
        """Whether they came without a token."""
        return self.name is None


class Authority(Protocol):
    """Turns an ``Authorization`` header into a caller."""

    def identify(self, authorization: str | None) -> Caller:
        """Return the caller; ApiError (401) for credentials that are not valid."""
        ...


class Everyone:
    """No tokens: whoever reaches the server owns it. Only for a server on the loopback address."""

    def identify(self, authorization: str | None) -> Caller:
        """Everyone may do everything; a token is ignored, since clients send the one of another hub unasked."""
        return Caller("local", write=frozenset({EVERYTHING}))


class Tokens:
    """Tokens of a file.

    Raises
    ------
    HubError
        The file is missing or malformed; also later, from `identify`, so that a broken file locks the door.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int, int] | None = None
        self._file = TokenFile()
        self._load()

    def identify(self, authorization: str | None) -> Caller:
        """Caller of a ``Bearer`` token, or of a ``Basic`` one (any user name, the token as password)."""
        self._load()
        text = _credentials(authorization)
        if text is None:
            return Caller(None, public=self._file.anonymous)
        digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
        holder = None
        for token in self._file.tokens:  # all of them, so that time tells nothing
            if hmac.compare_digest(token.sha256, digest):
                holder = token
        if holder is None:
            raise ApiError(401, "Invalid credentials in Authorization header")
        return Caller(holder.name, read=frozenset(holder.read), write=frozenset(holder.write))

    def _load(self) -> None:
        try:
            status = self.path.stat()
        except OSError as error:
            raise StoreError(f"the tokens file {self.path} cannot be read: {error.strerror}", path=self.path) from error
        stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
        if stamp != self._stamp:
            self._file, self._stamp = read(self.path), stamp


def _among(namespace: str, scopes: frozenset[str]) -> bool:
    return not {EVERYTHING, name_key(namespace)}.isdisjoint(map(name_key, scopes))


def read(path: Path) -> TokenFile:
    """Read a tokens file. Raises StoreError naming the place that is wrong."""
    try:
        data = read_capped(path, MAX_FILE)
        return validate(TokenFile, canonical.loads(data, what=str(path), limit=MAX_FILE), what=str(path))
    except ManifestError as error:
        raise StoreError(error.message, path=path, hint="make tokens with `hub registry token`") from error


def add(path: Path, name: str, *, read_scopes: tuple[str, ...], write_scopes: tuple[str, ...]) -> str:
    """Make a token and write its hash; returns the token's text, which is kept nowhere.

    Raises
    ------
    UsageError
        The name is taken, or the token would be good for nothing.
    """
    from datetime import datetime, timezone

    if not (read_scopes or write_scopes):
        raise UsageError(f"token {name!r} may do nothing", hint="give --read NS or --write NS ('*' for all)")
    text = PREFIX + secrets.token_urlsafe(32)
    with _changing(path) as tokens:
        if name in tokens:
            raise UsageError(f"{path} has a token {name!r} already", hint="give another name, or revoke it first")
        entry = {
            "name": name,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "read": read_scopes,
            "write": write_scopes,
            "created": datetime.now(timezone.utc).replace(microsecond=0),
        }
        try:
            tokens[name] = validate(Token, entry, what=f"token {name!r}")
        except ManifestError as error:
            raise UsageError(error.message) from error
    return text


def revoke(path: Path, name: str) -> None:
    """Take a token out. Raises NotFound with did-you-mean."""
    with _changing(path) as tokens:
        if name not in tokens:
            raise NotFound(f"{path} has no token {name!r}", path=path, hint=suggest(name, tokens))
        del tokens[name]


@contextmanager
def _changing(path: Path) -> Iterator[dict[str, Token]]:
    import json

    from filelock import FileLock

    with FileLock(path.with_name(f".{path.name}.lock")):
        before = read(path) if path.exists() else TokenFile()
        tokens = {token.name: token for token in before.tokens}
        yield tokens
        after = before.model_copy(update={"tokens": tuple(tokens.values())})
        atomic_write(path, json.dumps({"anonymous": after.anonymous, **after.as_dict()}, indent=2).encode() + b"\n")
        path.chmod(0o600)


def _credentials(authorization: str | None) -> str | None:
    if not authorization:
        return None
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            pass
    raise ApiError(401, "Invalid credentials in Authorization header")
