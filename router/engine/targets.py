"""From what a row names to what runs: a ref, an expression, a router, `base:adapter`, or the bare base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from threading import RLock

from compose.algebra import parse
from compose.base.compatibility import compare
from compose.expr.tree import IDENTITY, Call, Expr, Ref, Seq, substitute
from compose.function import get_function
from compose.planning.plan import plan
from compose.planning.unfold import Resolved
from compose.reader import ReaderText, refuse_readers
from hub.errors import UsageError
from hub.manifest import BaseIdentity, Manifest
from hub.store import Artifact
from router.engine.host import Host
from router.engine.mixture import Mixture, refuse_mixture
from router.engine.readers import Readers, Scored
from router.engine.routing import Routing, routing
from router.engine.sources import KnownAdapter, Sources


@dataclass(frozen=True, eq=False)
class Target:
    """What is applied to a row.

    Attributes
    ----------
    text
        As it was asked for.
    digest
        Of the artifact that answers, or of the expression with its members' digests; None where a member has none.
    expr
        Over the names of residents.
    names
        Adapters that have to be resident.
    labels, task, max_length, front
        See `KnownAdapter`; of all its adapters together.
    pooling
        How the states of a text become its vector: what the first adapter's manifest says (`pooling` among its
        hyperparameters), else the base.
    routing
        Where a router has yet to choose: `expr` is then of no meaning.
    mixture
        Where output probabilities are mixed: likewise.
    read, several
        Of an artifact with a reader: what its texts are given to, and whether a text may have any number of labels.
    """

    text: str
    expr: Expr
    names: tuple[str, ...]
    labels: tuple[str, ...] = ()
    task: str = "generate"
    max_length: int | None = None
    front: int = 0
    routing: Routing | None = None
    mixture: Mixture | None = None
    digest: str | None = None
    pooling: str = ""
    read: Callable[[Sequence[ReaderText]], list[Scored]] | None = None
    several: bool = False


class Targets:
    """Targets by their text, made once each as long as the store does not change; from any thread."""

    def __init__(self, host: Host, sources: Sources, readers: Readers, *, allow_base_drift: bool = False) -> None:
        self._host, self.sources, self._readers = host, sources, readers
        self._allow_drift = allow_base_drift
        self._made: dict[str, Target] = {}
        self._lock = RLock()
        self.bare = Target("", IDENTITY, ())
        self.bases = {host.name}  # names of the base itself

    def get(self, text: str | None) -> Target:
        """The target of a text.

        Raises
        ------
        HubError
            No such adapter (with the nearest names), another base, an expression that does not parse or cannot run.
        """
        text = self._local(text or "")
        if not text:
            return self.bare
        with self._lock:
            if self.sources.follow():
                self._made.clear()
            if text not in self._made:
                self._made[text] = self._make(text)
            return self._made[text]

    def forget(self) -> None:
        """Look everything up anew from now on."""
        with self._lock:
            self._made.clear()

    def _local(self, text: str) -> str:
        """Without the base's name in front, or nothing for the base itself."""
        text = text.strip()
        if text in self.sources.given:
            return text
        if text in self.bases:
            return ""
        base = next((base for base in self.bases if text.startswith(base + ":")), None)
        return text if base is None else text.removeprefix(base + ":")

    def _make(self, text: str) -> Target:
        tree = Ref(text) if text in self.sources.given else parse(text)
        if isinstance(tree, Ref):
            artifact = self.sources.artifact(tree.text)
            if artifact is not None and artifact.manifest.type == "router":
                return self._router(text, artifact)
            if artifact is not None and artifact.manifest.reader is not None:
                return self._read(text, artifact)
        known: dict[str, KnownAdapter] = {}

        def resolve(ref: str) -> Resolved:
            artifact = self.sources.artifact(ref)
            if artifact is not None and artifact.manifest.type == "composition":
                return artifact.manifest
            known[ref] = self.sources.known(ref)
            return known[ref].facts

        planned = plan(tree, resolve, check_base=self._check, allow_base_drift=self._allow_drift)
        facts = [leaf.facts for leaf in known.values() if isinstance(leaf.facts, Manifest)]
        refuse_readers(facts, "an expression mixes adapters")
        expr = substitute(planned.expression, lambda ref: Ref(known[ref.text].name))
        mixture = _mixture(expr)
        leaves = [known[ref] for ref in planned.leaves]
        labels, task = _answers(expr, {leaf.name: leaf for leaf in leaves}.__getitem__)
        lengths = [leaf.max_length for leaf in leaves if leaf.max_length is not None]
        names = tuple(dict.fromkeys(leaf.name for leaf in leaves))
        front = sum({leaf.name: leaf.front for leaf in leaves}.values())
        if mixture is not None:
            refuse_mixture(self._host, text, task)
            return Target(text, IDENTITY, names, front=front, mixture=mixture, digest=_digest(expr, leaves))
        answers = labels, task, min(lengths, default=None), front
        pooling = next((leaf.pooling for leaf in leaves if leaf.pooling), "")
        return Target(text, expr, names, *answers, digest=_digest(expr, leaves), pooling=pooling)

    def _router(self, text: str, artifact: Artifact) -> Target:
        refs = [need.name + "@" + need.digest for need in artifact.manifest.requires if need.digest is not None]
        members = [self.sources.known(ref) for ref in refs]
        for member in members:
            if member.facts.base is not None:
                self._check(member.name, member.facts.base)
        chooser = routing(artifact, self.sources.store, {member.name: member for member in members})
        names = tuple(chooser.members) if chooser.by_token else ()
        return Target(text, IDENTITY, names, routing=chooser, digest=artifact.digest)

    def _read(self, text: str, artifact: Artifact) -> Target:
        """One that answers through its reader: rows of it are computed by themselves, on a model of the readers'."""
        if artifact.manifest.base is not None:
            self._check(text, artifact.manifest.base)
        reader = self._readers.get(artifact)
        return Target(
            text,
            IDENTITY,
            (),
            reader.labels,
            "regress" if reader.task == "regression" else "classify",
            digest=artifact.digest,
            read=partial(self._readers.read, artifact),
            several=reader.task == "multi_label_classification",
        )

    def _check(self, text: str, made_for: BaseIdentity) -> None:
        compare(made_for, self._host.identity, ref=text, allow_drift=self._allow_drift)


def _digest(expr: Expr, leaves: Sequence[KnownAdapter]) -> str | None:
    """The digest of a single artifact, or one of the expression and its leaves' digests."""
    digests = {leaf.name: leaf.source.digest for leaf in leaves if isinstance(leaf.source, Artifact)}
    if len(digests) < len({leaf.name for leaf in leaves}):
        return None
    if isinstance(expr, Ref):
        return digests[expr.text]
    told = "\n".join([str(expr), *(f"{name}={digest}" for name, digest in sorted(digests.items()))])
    return "sha256:" + sha256(told.encode()).hexdigest()


def _mixture(expr: Expr) -> Mixture | None:
    """The ensemble that an expression is; UsageError for other functions that do not run inside a forward pass."""
    if isinstance(expr, Call) and get_function(expr.function).family == "ensemble":
        for expert in expr.args:
            _refuse_calls(expert)
        return Mixture.of(expr)
    _refuse_calls(expr)
    return None


def _refuse_calls(expr: Expr) -> None:
    if isinstance(expr, Call) and get_function(expr.function).family not in ("merge", "select"):
        raise UsageError(
            f"{expr.function}(...) does not run inside one forward pass",
            hint="`hub route fit` makes a router of its members, which can be named here",
        )
    for child in expr.children:
        _refuse_calls(child)


def _answers(expr: Expr, known: Callable[[str], KnownAdapter]) -> tuple[tuple[str, ...], str]:
    """Labels and task of an expression: those of its head; heads side by side must agree, in ``>>`` the last stays."""
    if isinstance(expr, Ref):
        adapter = known(expr.text)
        return adapter.labels, adapter.task
    parts = [answer for child in expr.children if (answer := _answers(child, known))[1] != "generate"]
    if not parts:
        return (), "generate"
    if len(set(parts)) > 1 and not isinstance(expr, Seq):
        raise UsageError(
            f"{expr} brings heads for different labels ({', '.join(parts[0][0][:3])} and {', '.join(parts[1][0][:3])})",
            hint="a >> b keeps the last head",
        )
    return parts[-1]
