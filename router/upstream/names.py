"""What the name of a model in a request stands for now: a ref, a range, an alias, or an expression over them.

Answered from manifests; no tensor is read, and torch is not imported. What the store lacks is pulled from the remotes
that were named, if any, with every byte checked as `hub pull` does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from threading import Lock

from compose.algebra import normalize, parse, to_json
from compose.base.compatibility import compare
from compose.base.fingerprint import directory_identity
from compose.base.location import locate
from compose.errors import KindError
from compose.expr.tree import Call, Expr, Ref, substitute
from compose.function import get_function
from compose.planning.members import AdapterFinder
from compose.planning.plan import plan
from compose.reader import refuse_readers
from hub.api.places import open_place
from hub.errors import HubError, NotFound, RefError, RemoteError
from hub.io import canonical_json
from hub.manifest import BaseIdentity, Manifest
from hub.ref import AdapterRef
from hub.store import Artifact, Store
from hub.transfer import pull

_FORMAT = 1  # of what is written for a digest: another form is another digest
_WORD = re.compile(r"[\w.:/#-]+\Z")
_REMEMBERED = 4096  # names whose meaning is kept; a client may send any number of them
_SHOWN = 160  # characters of an expression inside a served name


@dataclass(frozen=True)
class Meaning:
    """What a name stands for.

    Attributes
    ----------
    text
        The expression over digests, in normal form: the same tomorrow.
    shown
        Likewise over versions, for people.
    digest
        64 hex digits over the expression, its members, the base and the limits of what may be written for it.
    lora
        Whether it is one artifact that is a plain LoRA already.
    """

    text: str
    shown: str
    digest: str
    lora: bool

    @property
    def name(self) -> str:
        """A name that no other version ever has; where it is not cut, an expression too: ``#`` begins a comment."""
        return f"{self.shown[:_SHOWN]}#{self.digest[:12]}"

    @property
    def number(self) -> int:
        """A positive integer of 60 bits, made of the digest."""
        return int(self.digest[:15], 16) or 1


class Names:
    """Names for one served base.

    Parameters
    ----------
    base
        A model directory, or a Hugging Face id whose files are on this machine.
    rank
        The largest rank that the engine takes.
    max_discarded
        Share of the energy of a change that its LoRA may leave out; 0 allows exact ones alone.
    remotes
        Names, URLs or paths of remotes, asked in turn for what the store lacks.
    """

    def __init__(self, base: str | Path, *, rank: int, max_discarded: float = 0.0, remotes: Sequence[str] = ()) -> None:
        self.base, self.rank, self.max_discarded, self.remotes = str(base), rank, max_discarded, tuple(remotes)
        self._store = Store()  # of the thread that calls `now`
        self._known: dict[str, Meaning | None] = {}
        self._seen = -1
        self._identity: BaseIdentity | None = None
        self._lock = Lock()

    @property
    def home(self) -> Path:
        """Root of the store."""
        return self._store.root

    @cached_property
    def directory(self) -> Path:
        """Where the base lies."""
        return locate(self.base).directory

    def now(self, text: str) -> Meaning | None:
        """What a name stands for at this moment by the store alone; None where :meth:`find` has to say.

        A look at the length of the store's log where nothing has changed; a few manifests otherwise. Raises nothing.
        """
        if self._identity is None:
            return None
        seen = self._store.ledger.size  # append-only: it has grown or is as it was
        if seen != self._seen or len(self._known) >= _REMEMBERED:
            self._known.clear()
            self._seen = seen
        if text not in self._known:
            try:
                self._known[text] = self._mean(text, self._store, remotes=())
            except (HubError, OSError):
                self._known[text] = None
        return self._known[text]

    def find(self, text: str) -> Meaning:
        """What a name stands for, pulling what is not here; may take long, from any thread.

        Raises
        ------
        NotFound
            No such adapter, here or at the remotes.
        BaseMismatch
            It was made for another base than the one that is served.
        KindError, PlanError, ExpressionError
            What cannot be one adapter: routers, ensembles, classifiers, artifacts with a reader.
        RemoteError
            A remote cannot be reached, and no other one has it.
        """
        self.identity()
        return self._mean(text, Store(), self.remotes)

    def identity(self) -> BaseIdentity:
        """Identity of the served base; its files are read at the first call (and remembered under HUB_HOME)."""
        with self._lock:
            if self._identity is None:
                self._identity = directory_identity(locate(self.base))
            return self._identity

    def _mean(self, text: str, store: Store, remotes: Sequence[str]) -> Meaning:
        finder = AdapterFinder(store, fetch=lambda ref: _fetch(ref, store, remotes), paths=False)
        planned = plan(_read(text), finder.resolve, check_base=self._check)  # messages show what was asked for
        members = {leaf: finder.find(leaf).manifest for leaf in planned.leaves}
        manifests = [manifest for manifest in members.values() if manifest is not None]
        _refuse(planned.expression, manifests)
        # However a ref was written, its digest decides the order of the normal form.
        whole = normalize(substitute(planned.expression, lambda ref: _by_digest(members[ref.text])))
        shown = normalize(substitute(planned.expression, lambda ref: _by_version(members[ref.text])))
        facts = {
            "format": _FORMAT,
            "expression": to_json(whole),
            "base": self.identity().weights_fingerprint,
            "rank": self.rank,
            "max_discarded": self.max_discarded,
        }
        digest = sha256(canonical_json.dumps(facts)).hexdigest()
        lora = isinstance(whole, Ref) and manifests[0].kind == "lora"
        return Meaning(str(whole), str(shown), digest, lora)

    def _check(self, text: str, made_for: BaseIdentity) -> None:
        compare(made_for, self.identity(), ref=text)


def is_word(text: str) -> bool:
    """Whether a text could be any model's name: no operators, no calls, no pins."""
    return bool(_WORD.match(text))


def _read(text: str) -> Expr:
    """An expression, or a ref by itself, which may have a range without quotes: ``acme/tone>=1,<2``."""
    with suppress(RefError):
        return Ref(str(AdapterRef.parse(text)))
    return parse(text)


def _fetch(text: str, store: Store, remotes: Sequence[str]) -> Artifact:
    try:
        return store.get(text)
    except NotFound as error:
        missing = error
    failed: RemoteError | None = None
    for place in remotes:
        remote = open_place(place)
        try:
            return pull(store, remote, AdapterRef.parse(text))  # type: ignore[arg-type]  # of a place there is one
        except NotFound:
            continue
        except RemoteError as error:
            failed = error
    raise failed or missing


def _by_digest(manifest: Manifest | None) -> Ref:
    assert manifest is not None  # noqa: S101 - directories are not found here
    return Ref(f"{manifest.name}@{manifest.digest}")


def _by_version(manifest: Manifest | None) -> Ref:
    assert manifest is not None  # noqa: S101
    return Ref(f"{manifest.name}@{manifest.version}")


def _refuse(expr: Expr, manifests: Sequence[Manifest]) -> None:
    """Refuse by name what is no one adapter of a causal language model."""
    refuse_readers(manifests, "an engine of others has no place for it")
    for manifest in manifests:
        if manifest.task not in (None, "causal_lm"):
            raise KindError(
                f"{manifest.ref} is for {manifest.task}, and this engine serves adapters of causal language models",
                ref=manifest.ref,
            )
    for node in expr.walk():
        if isinstance(node, Call) and get_function(node.function).family != "merge":
            raise KindError(
                f"{node} works on outputs, so no single adapter does what it does", hint="hub serve serves it"
            )
