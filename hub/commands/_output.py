"""What the commands of ``hub`` print: the tools of `hub.output`, and the facts of an artifact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hub.output import bytes_text, columns, json_option, print_json, say, warn

if TYPE_CHECKING:
    from hub.artifact import Artifact

__all__ = ["bytes_text", "columns", "json_option", "print_json", "say", "summary", "warn"]


def summary(artifact: Artifact) -> dict[str, Any]:
    """Facts of an artifact as JSON, from the index alone."""
    facts = artifact.facts
    return {
        "ref": str(artifact.ref),
        "name": facts.name,
        "version": facts.version,
        "digest": facts.digest,
        "type": facts.type,
        "kind": facts.kind,
        "method": facts.method,
        "task": facts.task,
        "base": facts.base,
        "license": facts.license,
        "summary": facts.summary,
        "size": facts.size,
        "created": facts.created,
        "aliases": list(facts.aliases),
        "yanked": facts.yanked,
    }
