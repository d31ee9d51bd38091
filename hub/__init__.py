"""Artifacts: adapters as immutable, versioned packages of bytes plus a manifest. Knows nothing of torch."""

from typing import TYPE_CHECKING

from hub.lazy import face

if TYPE_CHECKING:
    from hub.api.artifacts import diff as diff
    from hub.api.artifacts import export as export
    from hub.api.artifacts import import_ as import_
    from hub.api.artifacts import import_each as import_each
    from hub.api.artifacts import pull as pull
    from hub.api.artifacts import push as push
    from hub.api.artifacts import tree as tree
    from hub.api.projects import doctor as doctor
    from hub.api.projects import gc as gc
    from hub.api.projects import lock as lock
    from hub.api.projects import outdated as outdated
    from hub.api.projects import sync as sync
    from hub.api.versions import delete as delete
    from hub.api.versions import sign as sign
    from hub.api.versions import tag as tag
    from hub.api.versions import untag as untag
    from hub.api.versions import unyank as unyank
    from hub.api.versions import verify as verify
    from hub.api.versions import yank as yank
    from hub.errors import HubError as HubError
    from hub.errors import HubWarning as HubWarning
    from hub.manifest import Draft as Draft
    from hub.manifest import Manifest as Manifest
    from hub.project.named_remotes import Remotes as Remotes
    from hub.ref import AdapterRef as AdapterRef
    from hub.store import Artifact as Artifact
    from hub.store import Store as Store

    __version__: str

_HOMES = {
    "hub.api.artifacts": ("diff", "export", "import_", "import_each", "pull", "push", "tree"),
    "hub.api.projects": ("doctor", "gc", "lock", "outdated", "sync"),
    "hub.api.versions": ("delete", "sign", "tag", "untag", "unyank", "verify", "yank"),
    "hub.errors": ("HubError", "HubWarning"),
    "hub.manifest": ("Draft", "Manifest"),
    "hub.project.named_remotes": ("Remotes",),
    "hub.ref": ("AdapterRef",),
    "hub.store": ("Artifact", "Store"),
}

__all__, __getattr__, __dir__ = face(__name__, _HOMES)
