"""Places that artifacts are pushed to and pulled from; one file each, found by its URL scheme."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hub.remotes.base import Remote as Remote
    from hub.remotes.base import from_url as from_url

__all__ = ["Remote", "from_url"]


def __getattr__(name: str) -> Any:
    # PEP 562: the package itself costs nothing; the Protocol and the table load when they are asked for.
    if name not in __all__:
        raise AttributeError(f"module 'hub.remotes' has no attribute {name!r}")
    from hub.remotes import base

    return getattr(base, name)
