"""A router as an artifact: its members by range and digest, its method and gating, its statistics.

router.json                 method, options, gating, members
router.safetensors          statistics: "0/<name>" of the first member, ..., "*/<name>" of none in particular
aux/words.safetensors       the words of the members' texts (`hub.relations.word_counts`), where it was fitted on texts
README.md                   the card
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import compose
from compose.expr.tokens import IDENTITY_WORD
from compose.expr.tree import IDENTITY, Ref, seq
from compose.planning.members import AdapterFinder, StoredAdapter
from compose.planning.plan import plan
from compose.planning.requirements import requirements
from compose.reader import refuse_readers
from hub.errors import BaseMismatch, Conflict, IntegrityError, NotFound, UsageError
from hub.io.disk import tensor_file
from hub.manifest import BaseIdentity, Digest, Draft, Lineage, Manifest, Requirement
from hub.pack import pack
from hub.ref import AdapterRef
from hub.relations.word_counts import write_words
from hub.store import Artifact, Store
from router.gating import Gating
from router.router import Router
from router.scorer import SHARED, Scorer, Statistics, make_scorer

if TYPE_CHECKING:
    from hub.relations.word_counts import Counts

CONFIG: Final = "router.json"
STATISTICS: Final = "router.safetensors"
_HEADED: Final = ("classification", "token_classification", "regression")


class MemberFile(BaseModel):
    """One member in router.json: its name in the router, its ref and the digest it was fitted with.

    The bare base has neither: its ref is ``identity``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=256)
    ref: str
    digest: Digest | None = None


class RouterFile(BaseModel):
    """router.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: str
    options: dict[str, JsonValue] = Field(default_factory=dict)
    top_k: int | None = Field(None, ge=1)
    threshold: float = Field(0.0, ge=0, lt=1)
    temperature: float = Field(1.0, gt=0)
    members: tuple[MemberFile, ...] = Field(min_length=1, max_length=100_000)


@dataclass(frozen=True)
class StoredRouter:
    """A router with the artifacts it chooses among.

    Attributes
    ----------
    router : over the members' names.
    artifacts : name of a member -> its artifact; the bare base has none.
    base : the base they were made for, where known.
    manifest : of the router; None before it is published.
    """

    router: Router
    artifacts: Mapping[str, Artifact]
    base: BaseIdentity | None
    manifest: Manifest | None = None

    def attach(self, model: PreTrainedModel, *, allow_base_drift: bool = False) -> None:
        """Make the members resident under their names, frozen."""
        for name, artifact in self.artifacts.items():
            compose.attach(model, name, artifact, allow_base_drift=allow_base_drift).freeze()


def members_of(texts: Sequence[str], finder: AdapterFinder) -> dict[str, StoredAdapter | None]:
    """Members by name, from ``ns/name@1.0.0`` or ``name=ns/name``; a name is the ref's last part where none is given.

    The bare base is a member by the word ``identity`` (``none=identity``), and None here. A directory that was packed
    is one by its path; it is put into the store with the router.

    Raises
    ------
    UsageError
        No members, two of one name, or something that is no published or packed adapter.
    Conflict
        A packed directory whose version is published with another digest.
    NotFound, BaseMismatch
        A member that is not here or was yanked, or members of different bases or tokenizers.
    """
    members: dict[str, StoredAdapter | None] = {}
    for text in texts:
        name, _, ref = text.partition("=") if _is_named(text) else ("", "", text)
        stored = None if ref == IDENTITY_WORD else finder.find(ref)
        if stored is not None and (stored.manifest is None or stored.manifest.type not in ("adapter", "merge")):
            what = "a directory" if stored.manifest is None else f"a {stored.manifest.type}"
            raise UsageError(f"{ref} is {what}, and a router chooses among published adapters", hint="hub push DIR")
        if stored is not None and stored.manifest is not None and isinstance(stored.where, Path):
            _refuse_other_release(stored.manifest, ref, finder.store)
        name = name or (AdapterRef.parse(stored.manifest.name).name if stored and stored.manifest else ref)
        if name in members:
            raise UsageError(f"two members are called {name!r}", hint=f"name one of them: other={ref}")
        members[name] = stored
    adapters = adapters_of(members)
    if not adapters:
        raise UsageError("a router needs at least one adapter", hint="hub route fit MEMBERS... --method METHOD")
    facts = [stored.manifest for stored in adapters.values() if stored.manifest is not None]
    refuse_readers(facts, "routers choose among adapters and heads")
    _check_alike(adapters, finder)
    if len(adapters) < len(members) and any(stored.facts.labels for stored in adapters.values()):
        raise UsageError("the members classify, and the bare base has no head to do so", hint="leave identity out")
    return members


def _refuse_other_release(packed: Manifest, ref: str, store: Store) -> None:
    """Conflict where a packed directory's version is published with other bytes: told before any work."""
    try:
        there = store.get(f"{packed.name}@{packed.version}")
    except NotFound:
        return
    if there.digest != packed.digest:
        raise Conflict(
            f"{ref} is another {packed.ref} than the one that is published",
            ref=packed.ref,
            hint=f"hub push {ref} --repack --bump auto, then name that version",
        )


def adapters_of(members: Mapping[str, StoredAdapter | None]) -> dict[str, StoredAdapter]:
    """All members but the bare base."""
    return {name: stored for name, stored in members.items() if stored is not None}


def refuse_heads(scorer: Scorer, members: Mapping[str, Manifest]) -> None:
    """UsageError where members classify, and the scorer reads or learns how they continue texts."""
    if scorer.continues and (
        heads := [name for name, facts in members.items() if facts.task in _HEADED or facts.labels]
    ):
        raise UsageError(
            f"{scorer.name} is for members that continue texts, and {heads[0]!r} has a head",
            hint="for heads: --method discriminant, centroid or task",
        )


def _is_named(text: str) -> bool:
    name, equals, ref = text.partition("=")
    return bool(equals and name and ref) and not any(sign in name for sign in "<>!~=@/") and not ref.startswith("=")


def _check_alike(members: Mapping[str, StoredAdapter], finder: AdapterFinder) -> None:
    """One base and one tokenizer for all; heads may be for different labels, since each row gets its own."""
    plan(seq(*(Ref(stored.text) for stored in members.values())), finder.resolve)
    first = next(iter(members.values()))
    for stored in members.values():
        assert stored.manifest is not None and first.manifest is not None  # noqa: S101 - narrows the type
        _refuse_yanked(stored.where)
        one, other = first.manifest.base, stored.manifest.base
        if one and other and one.tokenizer_digest != other.tokenizer_digest:
            raise BaseMismatch(
                f"{first.text} and {stored.text} were made with different tokenizers of {one.repo}",
                ref=stored.text,
                hint="their token ids mean different texts; train one of them again",
            )


def _refuse_yanked(artifact: Artifact | Path) -> None:
    if isinstance(artifact, Artifact) and artifact.facts.yanked is not None:
        raise NotFound(
            f"{artifact.ref} was yanked: {artifact.facts.yanked}",
            ref=artifact.ref,
            hint=f"fit the router again without it, or take that back: hub yank {artifact.ref} --undo",
        )


def publish(
    router: Router,
    members: Mapping[str, StoredAdapter | None],
    ref: str | AdapterRef,
    finder: AdapterFinder,
    *,
    words: Mapping[str, Counts] | None = None,
    kept: Sequence[Requirement] = (),
    license: str | None = None,
    summary: str = "",
) -> Artifact:
    """Put a router into the finder's store under ``ns/name@version``, whole or not at all.

    Members that are packed directories are put there first. `words` are the counts of the members' texts by name;
    `kept` are requirements whose ranges stay as they were.
    """
    name = AdapterRef.parse(ref)
    if name.version is None:
        raise UsageError(f"{ref} names no version, and a published one never changes", hint=f"write {name.id}@1.0.0")
    members = {name: _in_store(stored, finder.store) for name, stored in members.items()}
    adapters = adapters_of(members)
    manifests = [stored.manifest for stored in adapters.values() if stored.manifest is not None]
    tasks = {m.task for m in manifests}
    draft = Draft(
        name=name.id,
        version=str(name.version),
        type="router",
        method=router.scorer.name,
        hyperparameters={"options": router.scorer.shown_options, "gating": _gating(router.gating)},
        base=manifests[0].base,
        requires=_requires(adapters, finder, kept),
        task=tasks.pop() if len(tasks) == 1 else None,
        domains=tuple(dict.fromkeys(domain for m in manifests for domain in m.domains)),
        lineage=Lineage(parents=tuple(dict.fromkeys(stored.ref for stored in adapters.values()))),
        license=license,
        summary=summary,
    )
    with tempfile.TemporaryDirectory(prefix="moduloom-router-") as place:
        out = Path(place) / "router"
        out.mkdir()
        _write(out, router, members, words or {})
        (out / "README.md").write_text(_card(draft, members), encoding="utf-8")
        pack(out, draft)
        return finder.store.put(out)


def _in_store(stored: StoredAdapter | None, store: Store) -> StoredAdapter | None:
    if stored is None or isinstance(stored.where, Artifact):
        return stored
    artifact = store.put(stored.where)
    return StoredAdapter.of(str(artifact.ref), artifact)


def _write(out: Path, router: Router, members: Mapping[str, StoredAdapter | None], words: Mapping[str, Counts]) -> None:
    names, adapters = list(router.experts), adapters_of(members)
    listed = tuple(
        MemberFile(name=n, ref=stored.ref, digest=stored.digest) if stored else MemberFile(name=n, ref=IDENTITY_WORD)
        for n, stored in ((n, members[n]) for n in names)
    )
    gating = _gating(router.gating)
    config = RouterFile(method=router.scorer.name, options=router.scorer.shown_options, members=listed, **gating)
    (out / CONFIG).write_text(config.model_dump_json(indent=2, exclude_defaults=True) + "\n", encoding="utf-8")
    places = {SHARED: SHARED, **{name: str(i) for i, name in enumerate(names)}}
    tensors = {
        f"{places[name]}/{key}": value.detach().cpu().contiguous()
        for name, known in router.statistics.items()
        for key, value in known.items()
    }
    if tensors:
        with tensor_file(out / STATISTICS):
            save_file(tensors, out / STATISTICS)
    if words:
        write_words(out, {str(adapters[name].digest): counts for name, counts in words.items() if name in adapters})


def _requires(
    members: Mapping[str, StoredAdapter], finder: AdapterFinder, kept: Sequence[Requirement]
) -> tuple[Requirement, ...]:
    before = {need.digest: need for need in kept}
    needs = requirements([stored.text for stored in members.values()], finder)
    return tuple(before.get(need.digest, need) for need in needs)


def _gating(gating: Gating) -> dict[str, Any]:
    return {"top_k": gating.top_k, "threshold": gating.threshold, "temperature": gating.temperature}


def _card(draft: Draft, members: Mapping[str, StoredAdapter | None]) -> str:
    lines = [
        f"- `{name}`: " + (f"{stored.ref} ({(stored.digest or '')[:19]}...)" if stored else "the bare base")
        for name, stored in members.items()
    ]
    return "\n".join(
        [
            f"# {draft.ref}",
            "",
            draft.summary or f"Chooses among {len(members)} adapters by the method `{draft.method}`.",
            "",
            *lines,
            "",
            f"`hub route explain {draft.ref} --text ...` shows which of them answers what.",
            "",
        ]
    )


def load(ref: str | AdapterRef, store: Store | None = None) -> StoredRouter:
    """Read a router of the store and find its members.

    Raises
    ------
    UsageError
        The artifact is no router.
    NotFound
        A member is not in the store, or was yanked: it is named.
    IntegrityError
        Its files do not make a router.
    """
    store = store or Store()
    artifact = store.get(ref)
    if artifact.manifest.type != "router":
        what = artifact.manifest.type
        raise UsageError(f"{artifact.ref} is of type {what}, no router", hint="hub list --type router")
    try:
        config = RouterFile.model_validate_json(artifact.read(CONFIG))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise IntegrityError(f"{artifact.ref}: {CONFIG}, {place}: {first['msg']}", ref=artifact.ref) from None
    experts = {m.name: IDENTITY if m.ref == IDENTITY_WORD else Ref(m.name) for m in config.members}
    artifacts = {m.name: _member(m, artifact, store) for m in config.members if experts[m.name] != IDENTITY}
    if len(experts) < len(config.members):
        raise IntegrityError(f"{artifact.ref}: two members have one name", ref=artifact.ref)
    scorer = make_scorer(config.method, config.options)
    refuse_heads(scorer, {name: member.manifest for name, member in artifacts.items()})
    gating = Gating(config.top_k, config.threshold, config.temperature)
    statistics = _statistics(artifact, list(experts))
    for name, known in statistics.items():
        if missing := [key for key in scorer.wanted(name) if key not in known]:
            raise IntegrityError(
                f"{artifact.ref}: {STATISTICS} lacks {', '.join(missing)} of {name!r}, which {config.method} needs",
                ref=artifact.ref,
                hint="fit it again: hub route fit",
            )
    _check_widths(artifact, statistics)
    if config.top_k is not None and config.top_k > len(experts):
        problem = f"{CONFIG} keeps {config.top_k} of {len(experts)} members"
        raise IntegrityError(f"{artifact.ref}: {problem}", ref=artifact.ref, hint="fit it again: hub route fit")
    router = Router(scorer, experts, statistics, gating)
    return StoredRouter(router, artifacts, artifact.manifest.base, artifact.manifest)


def _check_widths(artifact: Artifact, statistics: Mapping[str, Statistics]) -> None:
    """What members have in common is of one width; that it is finite was seen when it entered the store."""
    first: dict[str, tuple[str, Tensor]] = {}
    for name, known in statistics.items():
        for key, value in known.items():
            other, like = first.setdefault(key, (name, value))
            if value.dim() != like.dim() or value.shape[-1:] != like.shape[-1:]:
                problem = f"{key} of {name!r} is {tuple(value.shape)}, that of {other!r} {tuple(like.shape)}"
                raise IntegrityError(
                    f"{artifact.ref}: {STATISTICS}: {problem}", ref=artifact.ref, hint="fit it again: hub route fit"
                )


def _member(member: MemberFile, router: Artifact, store: Store) -> Artifact:
    if member.digest is None:
        raise IntegrityError(f"{router.ref}: {CONFIG}: {member.ref} has no digest", ref=router.ref)
    pinned = AdapterRef.parse(AdapterRef.parse(member.ref).id).at(digest=member.digest)
    try:
        artifact = store.get(pinned)
    except NotFound as error:
        raise NotFound(
            f"router {router.ref} chooses among others {member.ref} ({member.digest[:19]}...), which is not here",
            ref=member.ref,
            digest=member.digest,
            hint=f"bring it with the router: hub pull {router.ref} --from URL|PATH",
        ) from error
    _refuse_yanked(artifact)
    return artifact


def _statistics(artifact: Artifact, names: Sequence[str]) -> dict[str, Statistics]:
    statistics: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    if STATISTICS not in artifact.files:
        return dict(statistics)
    for key, value in load_file(artifact.file(STATISTICS)).items():
        place, _, rest = key.partition("/")
        if place == SHARED:
            statistics.setdefault(SHARED, {})[rest] = value
        elif place.isdigit() and int(place) < len(names) and rest:
            statistics[names[int(place)]][rest] = value
        else:
            raise IntegrityError(f"{artifact.ref}: {STATISTICS} holds {key!r}, which is no member's", ref=artifact.ref)
    return dict(statistics)
