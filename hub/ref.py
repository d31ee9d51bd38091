"""How an adapter is named: ``ns/name@1.2.0``, ``@alias``, ``@sha256:...``, a range ``ns/name>=1,<2``, or bare.

Laws: ``AdapterRef.parse(str(ref)) == ref`` for every ref, and ``str(AdapterRef.parse(text))`` is canonical
(parsing and printing it again changes nothing). Names are shown as they were written and compared without case, as on
the Hugging Face Hub: ``Acme/Tone`` and ``acme/tone`` are one adapter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from packaging.version import InvalidVersion, Version

from hub.errors import RefError

DEFAULT_NAMESPACE = "local"
LATEST = "latest"  # the one computed alias: the highest version that is not yanked

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?\Z")
# What else stands first in an address of a registry or of the Hugging Face Hub.
RESERVED = frozenset({"api", "datasets", "kernels", "lfs", "spaces", "static"})
_ALIAS = re.compile(r"[a-z](?:[a-z0-9._-]*[a-z0-9])?\Z")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_SHAPE = re.compile(r"\s*(?P<id>[^@<>=!~\s]+)\s*(?:@\s*(?P<pin>\S+)|(?P<range>[<>=!~].*\S))?\s*\Z")
_OPERATORS = (">=", ">", "~=", "==", "!=", "<=", "<")  # the order of a canonical range: lower bounds first
_HINT = "write ns/name@1.2.0, ns/name@alias, ns/name@sha256:<64 hex>, 'ns/name>=1,<2' or ns/name"
MAX_TEXT = 512
MAX_NAME = 96
MAX_VERSION = 64


def check_name(text: str, *, what: str = "name") -> str:
    """A namespace or name, unchanged, or RefError.

    Letters, digits and ``. _ -`` between them. No ``..``, no ``--`` and no ``.git`` at the end, since the Hugging Face
    Hub refuses them in a repository's name; no namespace of `RESERVED`, no name ``resolve``: addresses have them.
    """
    if not _NAME.match(text) or ".." in text or "--" in text or len(text) > MAX_NAME:
        better = re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[:MAX_NAME]
        raise RefError(
            f"{text[:MAX_NAME]!r} is not a {what}: letters and digits with single '.', '_' or '-' between them, "
            f"at most {MAX_NAME} characters",
            hint=f"try {better!r}" if better and better != text else _HINT,
        )
    if text.lower().endswith(".git"):
        raise RefError(f"a {what} cannot end in .git, as {text!r} does: addresses of git do", hint=f"try {text[:-4]!r}")
    if text.lower() in (RESERVED if what == "namespace" else ("resolve",)):
        hint = f"try {text + '-team'!r}" if what == "namespace" else "try 'resolver'"
        raise RefError(f"{text!r} cannot be a {what}: it has a meaning in the addresses of registries", hint=hint)
    return text


def name_key(text: str) -> str:
    """What a name, a namespace or ``ns/name`` is compared by: itself without case."""
    return text.lower()


def check_alias(text: str) -> str:
    """An alias (``prod``, ``best``), unchanged, or RefError: it starts with a letter and is no version."""
    if not _ALIAS.match(text) or ".." in text or "--" in text or len(text) > MAX_NAME or _is_version(text):
        raise RefError(
            f"{text[:MAX_NAME]!r} is neither a version nor an alias",
            hint="a version is PEP 440 (1.2.0, 2.0rc1); an alias starts with a lower-case letter: prod, best-f1",
        )
    return text


def check_version(text: str) -> str:
    """A canonical PEP 440 version, or RefError.

    Epochs (``1!2.0``) and local parts (``1.0+cu``) are refused: neither can be a tag of an OCI registry, and
    ``+`` composes adapters.
    """
    if len(text) > MAX_VERSION:
        raise RefError(f"a version of {len(text)} characters is too long (at most {MAX_VERSION})")
    try:
        version = Version(text)
    except InvalidVersion:
        raise RefError(f"{text!r} is not a version", hint="versions are PEP 440: 1.2.0, 2.0rc1") from None
    if version.epoch or version.local:
        raise RefError(
            f"version {text!r} has an epoch or a local part, which registries cannot store",
            hint=f"use {version.base_version.split('!')[-1]}",
        )
    return str(version)


def check_digest(text: str) -> str:
    """``sha256:`` and 64 lower-case hex digits, unchanged, or RefError."""
    if not _DIGEST.match(text):
        raise RefError(f"{text[:80]!r} is not a digest", hint="a digest is sha256: and 64 lower-case hex digits")
    return text


def check_range(text: str) -> str:
    """A canonical PEP 440 range: no spaces, no doubles, lower bounds first; or RefError."""
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    if len(text) > MAX_TEXT:
        raise RefError(f"a range of {len(text)} characters is too long (at most {MAX_TEXT})")
    try:
        parts = list(SpecifierSet(text))
    except InvalidSpecifier:
        parts = []
    if not parts or any(part.operator not in _OPERATORS for part in parts):
        raise RefError(f"{text!r} is not a version range", hint="a range is PEP 440: >=1,<2 or ~=1.4 or ==1.*")
    clauses = set()
    for part in parts:
        stem, star = (part.version[:-2], ".*") if part.version.endswith(".*") else (part.version, "")
        clauses.add((_OPERATORS.index(part.operator), part.operator + check_version(stem) + star))
    return ",".join(clause for _, clause in sorted(clauses))


def _is_version(text: str) -> bool:
    try:
        Version(text[:MAX_VERSION])
    except InvalidVersion:
        return False
    return True


@dataclass(frozen=True, slots=True, eq=False)
class AdapterRef:
    """A name and at most one of version, alias, digest and range. Frozen, hashable, validated when made.

    Two refs are equal when their names are, without case, and they pin the same.

    Examples
    --------
    >>> str(AdapterRef.parse("tone"))
    'local/tone'
    >>> str(AdapterRef.parse("acme/tone < 2, >= 1"))
    'acme/tone>=1,<2'
    """

    namespace: str
    name: str
    version: str | None = None
    alias: str | None = None
    digest: str | None = None
    range: str | None = None

    def __post_init__(self) -> None:
        check_name(self.namespace, what="namespace")
        check_name(self.name)
        checks = {"version": check_version, "alias": check_alias, "digest": check_digest, "range": check_range}
        pins = {field: check for field, check in checks.items() if getattr(self, field) is not None}
        if len(pins) > 1:
            raise RefError(f"a ref has one of version, alias, digest and range, not {' and '.join(pins)}")
        for field, check in pins.items():
            object.__setattr__(self, field, check(getattr(self, field)))

    @classmethod
    def parse(cls, text: str | AdapterRef) -> AdapterRef:
        """Read a ref; a bare name is in the namespace ``local``. Raises RefError."""
        if isinstance(text, AdapterRef):
            return text
        match = _SHAPE.match(text) if len(text) <= MAX_TEXT else None
        if match is None:
            raise RefError(f"{text[:80]!r} is not an adapter ref", hint=_HINT)
        namespace, slash, name = match["id"].partition("/")
        if not slash:
            namespace, name = DEFAULT_NAMESPACE, namespace
        pin = match["pin"]
        if pin is None:
            return cls(namespace, name, range=match["range"])
        if pin.startswith("sha256:"):
            return cls(namespace, name, digest=pin)
        if _is_version(pin):
            return cls(namespace, name, version=pin)
        return cls(namespace, name, alias=pin)

    @property
    def id(self) -> str:
        """``ns/name``, without version, alias, digest or range."""
        return f"{self.namespace}/{self.name}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdapterRef) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[str | None, ...]:
        return name_key(self.id), self.version, self.alias, self.digest, self.range

    @property
    def pin(self) -> str | None:
        """What stands behind the ``@``: a version, an alias or a digest."""
        return self.version or self.alias or self.digest

    def at(
        self,
        *,
        version: str | None = None,
        alias: str | None = None,
        digest: str | None = None,
    ) -> AdapterRef:
        """Return the same name, pinned otherwise (or not at all)."""
        return replace(self, version=version, alias=alias, digest=digest, range=None)

    def __str__(self) -> str:
        if self.range is not None:
            return f"{self.id}{self.range}"
        return self.id if self.pin is None else f"{self.id}@{self.pin}"


@lru_cache(maxsize=4096)
def version_key(text: str) -> str:
    """Text whose plain string order is the PEP 440 order of versions, equal for equal versions (1.0 and 1.0.0).

    It lets SQLite sort and compare versions: release numbers carry their length, and the marks after them
    order ``.devN`` < ``aN`` < ``bN`` < ``rcN`` < final < ``.postN``.
    """

    def number(value: int) -> str:
        return f"{len(str(value)):02d}{value}"

    version = Version(text)
    release = list(version.release)
    while len(release) > 1 and release[-1] == 0:
        release.pop()
    if version.pre is not None:
        stage = {"a": "1", "b": "2", "rc": "3"}[version.pre[0]] + number(version.pre[1])
    else:
        stage = "0" if version.dev is not None and version.post is None else "4"
    post = "0" if version.post is None else "1" + number(version.post)
    dev = "1" if version.dev is None else "0" + number(version.dev)
    return ".".join(number(part) for part in release) + "!" + stage + post + dev


def names_adapter(text: str) -> bool:
    """Whether a remote's text is exactly ``ns/name``; what else lies there is not ours."""
    try:
        return text.count("/") == 1 and AdapterRef.parse(text).id == text
    except RefError:
        return False


def names_version(tag: str) -> bool:
    """Whether a remote's tag is a version in its canonical form."""
    try:
        return check_version(tag) == tag
    except RefError:
        return False


def spells_version(tag: str) -> bool:
    """Whether a remote's tag is a version in any form: ``v1.0`` is 1.0."""
    try:
        return bool(check_version(tag))
    except RefError:
        return False


def names_alias(tag: str) -> bool:
    """Whether a remote's tag is an alias."""
    try:
        return check_alias(tag) == tag
    except RefError:
        return False
