"""Which adapter, for which row or token, with what weight: scorer, gating, dispatch, and the DEMix ensemble."""

from typing import TYPE_CHECKING

from hub.lazy import face

if TYPE_CHECKING:
    from compose.base.texts import Text as Text
    from router.api import Explanation as Explanation
    from router.api import add as add
    from router.api import evaluate as evaluate
    from router.api import explain as explain
    from router.api import fit as fit
    from router.artifact import StoredRouter as StoredRouter
    from router.artifact import load as load
    from router.artifact import publish as publish
    from router.bench import Batch as Batch
    from router.bench import Bench as Bench
    from router.dispatch import row_expressions as row_expressions
    from router.engine.engine import Engine as Engine
    from router.engine.grammar import Grammar as Grammar
    from router.engine.request import Request as Request
    from router.engine.request import Result as Result
    from router.ensemble.demix import Ensemble as Ensemble
    from router.evaluation.measure import Report as Report
    from router.evaluation.similar import rank as rank
    from router.gating import Gating as Gating
    from router.gating import gate as gate
    from router.router import Router as Router
    from router.running.run import run as run

    __version__: str

_HOMES = {
    "router.api": ("Explanation", "add", "evaluate", "explain", "fit"),
    "router.artifact": ("StoredRouter", "load", "publish"),
    "router.bench": ("Batch", "Bench"),
    "router.dispatch": ("row_expressions",),
    "router.engine.engine": ("Engine",),
    "router.engine.grammar": ("Grammar",),
    "router.engine.request": ("Request", "Result"),
    "router.ensemble.demix": ("Ensemble",),
    "router.evaluation.measure": ("Report",),
    "router.evaluation.similar": ("rank",),
    "compose.base.texts": ("Text",),
    "router.gating": ("Gating", "gate"),
    "router.router": ("Router",),
    "router.running.run": ("run",),
}

__all__, __getattr__, __dir__ = face(__name__, _HOMES)
