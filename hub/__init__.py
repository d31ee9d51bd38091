"""Artifacts: adapters as immutable, versioned packages of bytes plus a manifest. Knows nothing of torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hub.errors import HubError as HubError
    from hub.manifest import Draft as Draft
    from hub.manifest import Manifest as Manifest
    from hub.ref import AdapterRef as AdapterRef
    from hub.store import Artifact as Artifact
    from hub.store import Store as Store

_HOMES = {
    "AdapterRef": "hub.ref",
    "Artifact": "hub.store",
    "Draft": "hub.manifest",
    "HubError": "hub.errors",
    "Manifest": "hub.manifest",
    "Store": "hub.store",
}

__all__ = ["AdapterRef", "Artifact", "Draft", "HubError", "Manifest", "Store"]


def __getattr__(name: str) -> Any:
    # PEP 562: `import hub` stays free, a name costs what it needs when it is first asked for.
    if name not in _HOMES:
        raise AttributeError(f"module 'hub' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
