"""From an expression to an artifact: a composition, which requires its members, or one merged adapter.

A composition pins each member by digest, so it means tomorrow what it means today; the range beside it says what a
newer release of it may take instead. A merged adapter stands alone; its parents are in its lineage.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from compose.algebra import parse
from compose.algebra.carets import point
from compose.artifacts.cards import composition_card, merge_card
from compose.base.texts import read_texts
from compose.errors import PlanError
from compose.expr.tree import Call, Expr, Ref, substitute
from compose.function import get_function
from compose.inspection.explain import check
from compose.parameter_space.method import refuse_without_data
from compose.planning.members import AdapterFinder, StoredAdapter
from compose.planning.plan import Plan, plan
from compose.planning.requirements import requirements, unpublished
from hub.errors import HubError, UsageError
from hub.io.files import sha256_file
from hub.manifest import BaseIdentity, Draft, Lineage, Manifest, Metric
from hub.pack import pack
from hub.ref import AdapterRef
from hub.store import Artifact

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compose.parameter_space.execute import Merged
    from hub.console.progress import Steps

_ALL = "data"  # the name of what is measured for all members, where it is one file

__all__ = ["publish_composition", "publish_merge", "requirements"]

CERTIFICATE = "certificate.json"
T = TypeVar("T")


def publish_composition(
    text: str,
    ref: str | AdapterRef,
    finder: AdapterFinder,
    *,
    base: str | Path | None = None,
    allow_base_drift: bool = False,
    license: str | None = None,
    summary: str = "",
    method: str | None = None,
    metrics: Sequence[Metric] = (),
) -> Artifact:
    """Publish an expression as a composition artifact into the finder's store.

    Parameters
    ----------
    text
        The expression. Its adapters are artifacts of the store.
    ref
        ``ns/name@version`` of the new artifact.
    base
        Check it on this base, shapes and all, and record that base; default: the one its members were made for.
    method, metrics
        How its members were learned together, and what the whole was measured at.

    Raises
    ------
    HubError
        Anything ``hub compose check`` refuses; a member that is no published artifact; a version that is taken.
    """
    name = _versioned(ref)
    expr = parse(text)
    refuse_without_data(expr)
    if base is not None:
        planned = check(text, finder, base=base, allow_base_drift=allow_base_drift).plan
    else:
        planned = _checked(text, expr, finder, allow_base_drift)
    for leaf in expr.refs:
        _refuseunpublished(text, finder.find(leaf))
    pinned = _unambiguous(expr, finder)
    requires = requirements(expr.refs, finder)
    facts = _shared_facts([finder.find(leaf) for leaf in planned.leaves])
    facts.pop("trained_on", None)  # a composition was not trained
    draft = Draft(
        name=name.id,
        version=str(name.version),
        type="composition",
        expression=str(pinned),
        requires=requires,
        base=_identity(base) if base is not None else planned.base,
        placement=tuple(planned.sites),
        lineage=Lineage(parents=tuple(dict.fromkeys(finder.find(leaf).ref for leaf in expr.refs))),
        summary=summary,
        metrics=tuple(metrics),
        **{**facts, **({"license": license} if license else {}), **({"method": method} if method else {})},
    )
    stored = {(h.manifest.name, h.digest): h.ref for h in map(finder.find, expr.refs) if h.manifest is not None}
    members = [stored[need.name, need.digest] for need in requires]
    return _put(finder, draft, lambda out: _write(out / "README.md", composition_card(draft, members)))


def _unambiguous(expr: Expr, finder: AdapterFinder) -> Expr:
    """The expression with refs that say what they mean without the command line that named them.

    A name that stands for two versions is written by digest, since a requirement pins a name; names given by
    ``--adapter`` are written as the refs they stand for.
    """
    digests: dict[str, set[str | None]] = {}
    for text in expr.refs:
        stored = finder.find(text)
        digests.setdefault(_id(stored), set()).add(stored.digest)

    def leaf(ref: Ref) -> Expr:
        stored = finder.find(ref.text)
        if len(digests[_id(stored)]) > 1:
            return Ref(f"{_id(stored)}@{stored.digest}")
        return Ref(str(AdapterRef.parse(str(finder.given.get(ref.text, ref.text)))))

    return substitute(expr, leaf)


def _id(stored: StoredAdapter) -> str:
    return stored.manifest.name if stored.manifest is not None else stored.text


def publish_merge(
    text: str,
    ref: str | AdapterRef,
    finder: AdapterFinder,
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    allow_base_drift: bool = False,
    license: str | None = None,
    summary: str = "",
    progress: Steps | None = None,
    data: str | Path | Mapping[str, str | Path] | None = None,
) -> tuple[Artifact, Merged]:
    """Carry an expression out in parameter space and publish the one adapter it makes.

    Parameters
    ----------
    text
        The expression: a merge such as ``ties(a, b)``, or sums and sequences where the kinds allow it. Its adapters
        are artifacts of the store or directories.
    base
        Default: the one its members were made for.
    rank
        Write the whole as one plain LoRA of this rank, whatever the kinds; the certificate says what that loses.
    progress
        Called with what is done, how many sites are done, and how many there are.
    data
        For a merge that measures something: a file of texts, or one for each of its arguments, by the argument's text.
        The artifact's lineage keeps their digests.

    Returns
    -------
    The artifact, and the merge with its certificate.

    Raises
    ------
    HubError
        Anything ``hub compose check`` refuses, before a tensor is read; an expression that is no merge.
    """
    name = _versioned(ref)
    checked = check(text, finder, base=base, allow_base_drift=allow_base_drift)
    _refuse_outputs(text, checked.expr)
    if data is None:
        refuse_without_data(checked.expr)
    files = data if isinstance(data, Mapping) else {} if data is None else {_ALL: data}
    texts = {name: [row.text for row in read_texts(file)] for name, file in files.items()}
    digests = {name: f"sha256:{sha256_file(Path(file))[0]}" for name, file in files.items()}
    members = [finder.find(leaf) for leaf in checked.plan.leaves]
    facts = _shared_facts(members)
    model = _load(checked.base, members, facts, allow_base_drift)
    merged = _merge(model, checked.plan.expression, rank, name, progress, texts)
    parents = [stored.ref for stored in members if stored.digest is not None]
    adapter, loss = merged.adapter, merged.certificate
    draft = Draft(
        name=name.id,
        version=str(name.version),
        type="merge",
        kind=adapter.kind,
        method=checked.expr.function if isinstance(checked.expr, Call) else "sum",
        hyperparameters={
            "adapter": adapter.config.model_dump(mode="json", exclude_defaults=True),
            "certificate": {"exact": loss.exact, "discarded": loss.share},
            **({"rank": rank} if rank is not None else {}),
        },
        base=_identity(model),
        placement=tuple(adapter.paths),
        lineage=Lineage(parents=tuple(parents), data=digests),
        expression=text,
        summary=summary,
        **{**facts, **({"license": license} if license else {})},
    )

    def fill(out: Path) -> None:
        from compose.api import save

        save(adapter, out, model=model, task=draft.task)
        _write(out / CERTIFICATE, json.dumps(loss.as_dict(), indent=2, sort_keys=True) + "\n")
        _write(out / "README.md", merge_card(draft, [stored.ref for stored in members], loss))

    return _put(finder, draft, fill), merged


def _load(base: str | Path, members: Sequence[StoredAdapter], facts: dict[str, Any], drift: bool) -> PreTrainedModel:
    from compose.api import attach
    from compose.base.model import load_base
    from compose.kind.registry import get_kind

    task = facts.get("task")
    labels = facts.get("labels") if task in ("classification", "token_classification") else None
    # Norms of a bfloat16 weight are exact in float32 only; where no kind asks for them the base stays as it is stored.
    exact = any(get_kind(stored.facts.kind).reads_below for stored in members)
    model = load_base(base, task=task, labels=labels or None, dtype="fp32" if exact else None)
    for stored in members:
        attach(model, stored.text, stored.where, allow_base_drift=drift)
    return model


def _merge(
    model: PreTrainedModel,
    expr: Expr,
    rank: int | None,
    name: AdapterRef,
    progress: Steps | None,
    texts: Mapping[str, Sequence[str]],
) -> Merged:
    from compose.merging.measure import batches_of
    from compose.merging.merge import lower_to_lora, merge

    batches = {member: batches_of(rows, model) for member, rows in texts.items()}
    data = batches.get(_ALL, batches or None)
    if rank is not None:
        return lower_to_lora(model, expr, rank=rank, name=name.name, progress=progress, data=data)
    return merge(model, expr, name=name.name, progress=progress, data=data)


def _refuse_outputs(text: str, expr: Expr) -> None:
    """Refuse what acts on outputs or chooses by input: it has no parameters to fold."""

    def attempt(part: Expr) -> None:
        for node in part.walk():
            if isinstance(node, Call) and get_function(node.function).family != "merge":
                raise PlanError(
                    f"{node} works on outputs, so no single adapter does what it does",
                    hint="leave --merge out: a composition holds any expression",
                )

    try:
        attempt(expr)
    except PlanError as error:
        raise point(text, error, attempt) from error


# -- what both share -----------------------------------------------------------------------------------------------


def _versioned(ref: str | AdapterRef) -> AdapterRef:
    name = AdapterRef.parse(ref)
    if name.version is None:
        raise UsageError(f"{ref} names no version, and a published one never changes", hint=f"write {name.id}@1.0.0")
    return name


def _checked(text: str, expr: Expr, finder: AdapterFinder, drift: bool) -> Plan:
    def attempt(part: Expr) -> Plan:
        return plan(part, finder.resolve, allow_base_drift=drift)

    try:
        return attempt(expr)
    except HubError as error:
        raise point(text, error, attempt) from error


def _refuseunpublished(text: str, stored: StoredAdapter) -> None:
    def attempt(part: Expr) -> None:
        if stored.digest is None and stored.text in part.refs:
            raise unpublished(stored)

    try:
        attempt(Ref(stored.text))
    except UsageError as error:
        raise point(text, error, attempt) from error


def _shared_facts(members: Sequence[StoredAdapter]) -> dict[str, Any]:
    """Facts that all members state alike; languages and domains of all of them."""
    manifests = [stored.manifest for stored in members if stored.manifest is not None]
    if not manifests:
        return {}

    def alike(of: Callable[[Manifest], T]) -> T | None:
        values = [of(manifest) for manifest in manifests]
        return values[0] if len(manifests) == len(members) and all(v == values[0] for v in values) else None

    facts = {
        # A reader answers for its own artifact alone: what is made of its adapter is no classifier.
        "task": alike(lambda m: m.head_task),
        "labels": alike(lambda m: m.labels if m.reader is None else ()),
        "license": alike(lambda m: m.license),
        "trained_on": alike(lambda m: m.trained_on),
        "languages": tuple(dict.fromkeys(x for m in manifests for x in m.languages)),
        "domains": tuple(dict.fromkeys(x for m in manifests for x in m.domains)),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _identity(base: str | Path | PreTrainedModel) -> BaseIdentity:
    from compose.base.model import identity_of

    return identity_of(base)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _put(finder: AdapterFinder, draft: Draft, fill: Callable[[Path], None]) -> Artifact:
    """Write a directory, pack it and put it into the store: whole or not at all."""
    with tempfile.TemporaryDirectory(prefix="moduloom-compose-") as place:
        out = Path(place) / "artifact"
        out.mkdir()
        fill(out)
        pack(out, draft)
        return finder.store.put(out)
