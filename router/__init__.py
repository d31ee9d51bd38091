"""Which adapter, for which row or token, with what weight: scorer, gating, dispatch, and the DEMix ensemble."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from router.bench import Batch as Batch
    from router.bench import Bench as Bench
    from router.dispatch import row_expressions as row_expressions
    from router.engine.engine import Engine as Engine
    from router.engine.request import Request as Request
    from router.ensemble.demix import Ensemble as Ensemble
    from router.gating import Gating as Gating
    from router.gating import gate as gate
    from router.router import Router as Router

_HOMES = {
    "Batch": "router.bench",
    "Bench": "router.bench",
    "Engine": "router.engine.engine",
    "Ensemble": "router.ensemble.demix",
    "Gating": "router.gating",
    "Request": "router.engine.request",
    "Router": "router.router",
    "gate": "router.gating",
    "row_expressions": "router.dispatch",
}

__all__ = ["Batch", "Bench", "Engine", "Ensemble", "Gating", "Request", "Router", "gate", "row_expressions"]


def __getattr__(name: str) -> Any:
    # PEP 562: importing the package must not import torch
    if name not in _HOMES:
        raise AttributeError(f"module 'router' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
