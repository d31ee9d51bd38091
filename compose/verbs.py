"""The verbs of ``hub compose`` as functions: expressions over artifacts and directories, before any model is loaded.

>>> compose.check("0.5 * acme/tone + acme/law", base="builtin:tiny-lm")
>>> compose.publish("acme/tone >> acme/law", "acme/both@1.0.0")
>>> artifact, merged = compose.publish_merge("ties(acme/tone, acme/law)", "acme/merged@1.0.0")

``adapters`` says what a name of the expression stands for: a directory or a ref. ``store`` is the one of HUB_HOME where
none is given.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from compose.planning.members import AdapterFinder
from hub.errors import HubWarning

if TYPE_CHECKING:
    from compose.inspection.explain import Checked, Explanation
    from compose.inspection.merge_doctor import Diagnosis
    from compose.merging.interference import Interference
    from compose.parameter_space.execute import Merged
    from hub.store import Artifact, Store

Given: TypeAlias = Mapping[str, str | Path]


def check(expr: str, *, adapters: Given | None = None, store: Store | None = None, **options: Any) -> Checked:
    """Say whether a composition works on a base; options and errors as for `compose.inspection.explain.check`."""
    from compose.inspection.explain import check as examine

    return examine(expr, AdapterFinder(store, adapters), **options)


def explain(expr: str, *, adapters: Given | None = None, store: Store | None = None, **options: Any) -> Explanation:
    """Plan, requirements, memory and cost of a composition; options and errors as for `check`."""
    from compose.inspection.explain import explain as examine

    return examine(expr, AdapterFinder(store, adapters), **options)


def publish(
    expr: str, ref: str, *, adapters: Given | None = None, store: Store | None = None, **options: Any
) -> Artifact:
    """Publish an expression, with what it requires pinned; see `compose.artifacts.publish.publish_composition`."""
    from compose.artifacts.publish import publish_composition

    return publish_composition(expr, ref, AdapterFinder(store, adapters), **options)


def publish_merge(
    expr: str, ref: str, *, adapters: Given | None = None, store: Store | None = None, **options: Any
) -> tuple[Artifact, Merged]:
    """Publish the one adapter that an expression makes, and say what that lost (``merged.certificate``).

    Options and errors as for `compose.artifacts.publish.publish_merge`.
    """
    from compose.artifacts.publish import publish_merge as put

    finder = AdapterFinder(store, adapters)
    artifact, merged = put(expr, ref, finder, **options)
    for held in finder:
        if held.digest is None:
            told = f"{held.text} is a directory that was never published, so the lineage of {artifact.ref} lacks it"
            warnings.warn(told, HubWarning, stacklevel=2)
    return artifact, merged


def interference(texts: Sequence[str], *, store: Store | None = None, **options: Any) -> Interference:
    """Cosines of what adapters change, pair by pair; see `compose.inspection.adapter_map.interference_of`."""
    from compose.inspection.adapter_map import interference_of

    return interference_of(texts, AdapterFinder(store), **options)


def diagnose(result: str, members: Sequence[str], *, store: Store | None = None, **options: Any) -> Diagnosis:
    """Recompute a merge exactly and say what is wrong in the one at hand; see `compose.inspection.merge_doctor`."""
    from compose.inspection.merge_doctor import examine

    return examine(result, members, AdapterFinder(store), **options)
