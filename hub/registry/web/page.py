"""What an adapter's page shows, gathered from the store."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from hub.errors import HubError, RefError
from hub.io.files import read_capped
from hub.manifest import Manifest, Metric, TensorEntry
from hub.ref import AdapterRef
from hub.registry.context import Access
from hub.registry.state.drafts import Recorded
from hub.registry.state.front_matter import MAX_CARD
from hub.registry.state.git_ids import File
from hub.registry.state.lineage import Node
from hub.registry.state.repositories import Revision
from hub.registry.state.search import visible
from hub.registry.web.lineage_svg import svg
from hub.registry.web.markdown import render
from hub.storage.releases import Catalogue, Release

MAX_ROWS = 400  # tensors shown; the manifest has them all
MAX_VERSIONS = 200


@dataclass(frozen=True)
class VersionRow:
    """One version in the list."""

    version: str
    digest: str
    aliases: list[str]
    yanked: str | None
    created: str
    size: int
    here: bool


@dataclass(frozen=True)
class MetricRow:
    """One figure, and how it compares to the version before (None where that has no such figure)."""

    metric: Metric
    change: float | None
    better: bool | None


@dataclass(frozen=True)
class Page:
    """Everything the template needs."""

    access: Access
    revision: Revision
    label: str  # the version, or the short commit id of a draft
    pin: str  # what to write behind revision=
    manifest: Manifest | None
    card: str
    files: Mapping[str, File]
    tensors: list[TensorEntry] = field(default_factory=list)
    parameters: int = 0
    metrics: list[MetricRow] = field(default_factory=list)
    versions: list[VersionRow] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)
    lineage: str = ""
    json: str = ""
    base_hint: str | None = None
    downloadable: bool = True

    @property
    def name(self) -> str:
        """``ns/name``."""
        return self.access.name

    @property
    def draft(self) -> bool:
        """Whether this is no published version."""
        return self.revision.release is None

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files.values())


def build(access: Access, revision: Revision, downloadable: bool) -> Page:
    """Gather the page of a revision."""
    repos, release = access.repos, revision.release
    catalogue = repos.catalogue(access.name)
    manifest = repos.store.manifest(release.digest) if release else None
    versions = _versions(access, catalogue, release)
    return Page(
        access=access,
        revision=revision,
        label=release.version if release else revision.oid[:12],
        pin=release.version if release else revision.oid,
        manifest=manifest,
        card=_card(access, revision) if downloadable else "",
        files=revision.tree,
        tensors=list(manifest.tensors[:MAX_ROWS]) if manifest else [],
        parameters=sum(math.prod(tensor.shape) for tensor in manifest.tensors) if manifest else 0,
        metrics=_metrics(access, manifest, catalogue.releases) if manifest else [],
        versions=versions,
        aliases=catalogue.aliases_of(release.digest) if release else [],
        lineage=_lineage(access, release.digest) if release else "",
        json=_shown(manifest) if manifest else "",
        base_hint=_base_hint(access, revision, manifest),
        downloadable=downloadable,
    )


def _card(access: Access, revision: Revision) -> str:
    file = revision.tree.get("README.md")
    if file is None or file.size > MAX_CARD:
        return ""
    text = read_capped(access.repos.path(file), MAX_CARD).decode("utf-8", "replace")
    return render(text, f"/{access.name}/resolve/{revision.oid}")


def _versions(access: Access, catalogue: Catalogue, here: Release | None) -> list[VersionRow]:
    rows = []
    for release in reversed(catalogue.releases[-MAX_VERSIONS:]):
        facts = access.repos.facts(access.name, release)
        row = VersionRow(
            release.version,
            release.digest,
            catalogue.aliases_of(release.digest),
            release.yanked,
            facts.created,
            facts.size,
            here is not None and release.digest == here.digest,
        )
        rows.append(row)
    return rows


def _metrics(access: Access, manifest: Manifest, releases: tuple[Release, ...]) -> list[MetricRow]:
    place = next((i for i, release in enumerate(releases) if release.digest == manifest.digest), 0)
    before = {}
    if place > 0:
        older = access.repos.store.manifest(releases[place - 1].digest)
        before = {(m.dataset, m.dataset_digest, m.split, m.metric): m.value for m in older.metrics}
    rows = []
    for metric in manifest.metrics:
        was = before.get((metric.dataset, metric.dataset_digest, metric.split, metric.metric))
        change = None if was is None else metric.value - was
        low = any(word in metric.metric.lower() for word in ("loss", "perplexity", "error", "ece"))
        better = None if not change else (change < 0) == low
        rows.append(MetricRow(metric, change, better))
    return rows


def _lineage(access: Access, digest: str) -> str:
    """Lineage as SVG; empty for an artifact that is related to nothing."""
    recorded = access.repos.recorded()
    store = access.repos.store

    def describe(key: str) -> Node | None:
        if not key.startswith("sha256:"):
            return _unresolved(key, access, recorded)
        facts = store.list(digest=key, yanked=True)
        if not facts:
            return Node(key, key[7:19], "not in this registry")
        about = facts[0].facts
        if not visible(access.caller, about.name, recorded):
            return None
        href = f"/{about.name}/tree/{about.version}"
        return Node(key, f"{about.name} {about.version}", about.kind or about.type, href, key == digest)

    graph = access.context.relations.around(digest, describe)
    return svg(graph) + svg(graph, tall=True) if len(graph.nodes) > 1 else ""


def _unresolved(key: str, access: Access, recorded: Recorded) -> Node | None:
    """Box for a ref that nothing here fits; it must not tell whether a private repository has that name."""
    try:
        ref = AdapterRef.parse(key)
    except RefError:
        return None
    return Node(key, key, "not in this registry") if visible(access.caller, ref.id, recorded) else None


def _shown(manifest: Manifest) -> str:
    """Manifest as JSON for reading: long lists of hashes are counted, not listed."""
    document = {"schema_version": manifest.schema_version, "type": manifest.type, **manifest.as_dict()}
    document["tensors"] = f"{len(manifest.tensors)} tensors, listed above"
    document["files"] = f"{len(manifest.files)} files, listed above"
    if isinstance(base := document.get("base"), dict):
        base["weights"] = f"{len(manifest.base.weights) if manifest.base else 0} fingerprints"
    return json.dumps(document, indent=2, ensure_ascii=False)


def _base_hint(access: Access, revision: Revision, manifest: Manifest | None) -> str | None:
    """Model that a PEFT config names, where the manifest identifies no base."""
    if manifest is not None and manifest.base is not None:
        return None
    file = revision.tree.get("adapter_config.json")
    if file is None or file.size > MAX_CARD:
        return None
    try:
        config = json.loads(read_capped(access.repos.path(file), MAX_CARD))
    except (ValueError, RecursionError, HubError):  # a draft may hold anything
        return None
    named = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return named[:200] if isinstance(named, str) and named else None
