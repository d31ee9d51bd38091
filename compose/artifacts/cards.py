"""The cards of what ``hub compose`` publishes: README.md with the facts of a manifest, for people and model hubs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import yaml

from hub.manifest import Draft, Requirement

if TYPE_CHECKING:
    from compose.parameter_space.certificate import Certificate

_SITES = 40  # rows of the certificate that are shown; certificate.json has all


def composition_card(draft: Draft, members: Sequence[str]) -> str:
    """Card of a composition; ``members`` are the refs its requirements stood for when it was published."""
    rows = [(need.name, need.range or "", ref, _short(need)) for need, ref in zip(draft.requires, members, strict=True)]
    return _card(
        draft,
        draft.summary or f"A composition of adapters of `{_repo(draft)}`.",
        ("Expression", _code(draft.expression)),
        ("Use", _use(draft)),
        ("Requires", _table(("adapter", "range", "published with", "digest"), rows)),
    )


def merge_card(draft: Draft, parents: Sequence[str], certificate: Certificate) -> str:
    """Card of a merged adapter, with what the merge has lost."""
    return _card(
        draft,
        draft.summary or f"A {draft.kind} adapter of `{_repo(draft)}`, merged from {len(parents)} adapters.",
        ("Expression", _code(draft.expression)),
        ("Use", _use(draft)),
        ("Merged from", "\n".join(f"- `{parent}`" for parent in parents)),
        ("Certificate", _certificate(certificate)),
    )


def _card(draft: Draft, summary: str, *sections: tuple[str, str]) -> str:
    parts = [_header(draft), f"# {draft.name} {draft.version}", summary]
    parts += [f"## {title}\n\n{text}" for title, text in sections]
    return "\n\n".join(parts) + "\n"


def _header(draft: Draft) -> str:
    facts: Mapping[str, object] = {
        "library_name": "moduloom",
        "base_model": _repo(draft) if "/" in _repo(draft) else None,  # hubs link it: only where they know the name
        "license": draft.license,
        "tags": [draft.type, *([draft.kind] if draft.kind else []), *([draft.task] if draft.task else [])],
    }
    text = yaml.safe_dump({k: v for k, v in facts.items() if v is not None}, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---"


def _repo(draft: Draft) -> str:
    return draft.base.repo if draft.base else "its base"


def _use(draft: Draft) -> str:
    repo = draft.base.repo if draft.base else "BASE"
    return _code(f'import compose\n\nmodel = compose.load("{repo}", "{draft.ref}")', "python")


def _code(text: str | None, language: str = "") -> str:
    return f"```{language}\n{text}\n```"


def _short(need: Requirement) -> str:
    return f"`{(need.digest or '')[:19]}...`"


def _certificate(certificate: Certificate) -> str:
    if certificate.exact:
        return "The merge is exact: the adapter holds all of it."
    worst = sorted(certificate.sites.items(), key=lambda item: -item[1].share)
    rows = [(f"`{path}`", str(loss.rank), f"{loss.energy:.4g}", f"{loss.share:.2%}") for path, loss in worst[:_SITES]]
    more = f"\n\n{len(worst) - _SITES} more sites in `certificate.json`." if len(worst) > _SITES else ""
    head = f"Written with a limited rank: {certificate}. Energy is ||D||² of the exact merge."
    return f"{head}\n\n" + _table(("site", "rank", "energy", "left out"), rows) + more


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
