"""Methods against each other at an equal budget: successive halving (arXiv:1502.07943).

In each of R = ceil(log2 n) rounds every method that is left trains for the same number of seconds, budget / (R * left),
is evaluated, and the better half goes on from where it stopped. So all rounds cost the same, and a method that is out
has had as much of every round as the winner had.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compose.kind.registry import get_kind, kinds, make_config
from hub.console.output import write_json
from hub.errors import UsageError
from train.config import TrainConfig, did_you_mean
from train.errors import NonFiniteLoss
from train.loop import fit
from train.method import make_method, trained
from train.pipeline import PreparedRun, prepare
from train.steps.checkpoint import CHECKPOINT
from train.steps.evaluate import rank
from train.steps.guards import options_of_the_run

__all__ = ["Runner", "plot_race", "race"]


@dataclass(frozen=True)
class Runner:
    """A method in the race, and how far it got."""

    method: str
    trainable: int
    rounds: int = 0
    steps: int = 0
    seconds: float = 0.0
    measured: dict[str, float] | None = None  # its best evaluation; None: it had none that is finite
    ended: str = ""  # why it stopped before the race did

    def as_dict(self) -> dict[str, Any]:
        """Values for scripts."""
        return dict(vars(self))


def race(
    config: TrainConfig,
    names: Sequence[str],
    budget: float = 600.0,
    folder: str | Path = "race",
    *,
    say: Callable[[str], None] = lambda _text: None,
) -> list[Runner]:
    """Race methods on the run's data and base; the winner first.

    Parameters
    ----------
    config
        The run. Its `options` are those of each method, by the method's name; others are those of its own `method`.
    budget
        Seconds of training and evaluation for all methods together, loading left out.
    folder
        What the race leaves: a folder with the checkpoint of each method, race.json (the places) and race.svg (the
        metric against trained parameters and seconds).

    Raises
    ------
    UsageError
        Fewer than two methods, no evaluation data, options of a method that does not race or has no such option; the
        folder holds something.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        hint = f"--out another folder, or remove {folder}"
        raise UsageError(f"{folder} holds an earlier race", path=folder, hint=hint)
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise UsageError("a race needs two or more different methods", hint="--methods lora,bitfit,prefix")
    if "eval" not in config.data:
        raise UsageError("a race needs rows to measure on", hint="data.eval=FILE, or a fraction such as data.eval=0.2")
    runs = _entered(config, names)
    folder.mkdir(parents=True, exist_ok=True)
    runners = {name: Runner(name, 0) for name in names}
    rounds, left = math.ceil(math.log2(len(names))), list(names)
    for number in range(1, rounds + 1):
        share = budget / (rounds * len(left))
        for name in left:
            runners[name] = _train(runners[name], runs[name], runners[name].seconds + share, folder / name)
            say(f"round {number}/{rounds}: {_told(runners[name])}")
        left = sorted(left, key=lambda name: _place(runners[name], config.best_metric))[: math.ceil(len(left) / 2)]
    places = sorted(runners.values(), key=lambda runner: (-runner.rounds, _place(runner, config.best_metric)))
    plot_race(places, config.best_metric, folder / "race.svg")
    write_json([runner.as_dict() for runner in places], str(folder / "race.json"))
    return places


def _entered(config: TrainConfig, names: Sequence[str]) -> dict[str, TrainConfig]:
    """The run of each method, whose names and options are looked at before the first one trains."""
    for name, options in config.options.items():
        nested = isinstance(options, dict)
        near = did_you_mean(name, names) if nested else ""
        fits = nested if name in names else config.method in names and not near
        if not fits:
            raise UsageError(
                f"options.{name} is not the options of a method that races{near}", hint="options.METHOD.KEY"
            )
    runs = {name: _of(config, name, names) for name in names}
    for run in runs.values():
        method, _ = make_method(run)
        if method.kind in kinds():  # not a composition of several
            with options_of_the_run():
                make_config(get_kind(method.kind), method.kind_options)
    return runs


def _of(config: TrainConfig, name: str, names: Sequence[str]) -> TrainConfig:
    """The run with this method; what was given stays given, so that a recipe fills in only the rest."""
    own = {key: value for key, value in config.options.items() if key not in names and name == config.method}
    given = {key: getattr(config, key) for key in config.model_fields_set if key not in ("method", "options")}
    return TrainConfig(**{**given, "method": name, "options": {**own, **config.options.get(name, {})}})


def _train(runner: Runner, config: TrainConfig, until: float, folder: Path) -> Runner:
    """Go on until `until` seconds of training; what has ended stays as it is."""
    if runner.ended:
        return replace(runner, rounds=runner.rounds + 1)
    ready: PreparedRun = prepare(config)
    data, learner, resume = ready.splits, ready.adapter, (folder / CHECKPOINT).exists()
    options: dict[str, Any] = {"method": ready.method, "out": folder, "seconds": until, "resume": resume}
    try:
        result = fit(ready.model, learner, data.train, data.eval, ready.config, **options)
    except NonFiniteLoss as error:
        result = error.result
    best = {k: v for k, v in result.best.items() if k != "step"} if result.best else None
    ended = "" if result.stopped == "time" else result.stopped
    done = replace(runner, rounds=runner.rounds + 1, steps=result.steps, seconds=result.seconds, ended=ended)
    return replace(done, trainable=trained(learner), measured=best)


def _place(runner: Runner, metric: str) -> tuple[float, float]:
    return rank(runner.measured, metric) if runner.measured is not None else (math.inf, math.inf)


def _told(runner: Runner) -> str:
    values = runner.measured or {}
    shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name not in ("rows", "tokens"))
    return f"{runner.method}: {shown or 'no evaluation that counts'} after {runner.steps} steps, {runner.seconds:.0f} s"


def plot_race(runners: Sequence[Runner], metric: str, path: Path) -> None:
    """The metric against trained parameters (log) and against seconds, side by side, as an SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    points = [(r, r.measured[metric]) for r in runners if r.measured is not None]
    with mpl.rc_context({"svg.hashsalt": "race", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, label in ((left, "trained parameters"), (right, "seconds")):
            for runner, value in points:
                x = runner.trainable if axes is left else runner.seconds
                axes.plot(x, value, "o", color="C3" if runner is runners[0] else "C0")
                axes.annotate(runner.method, (x, value), textcoords="offset points", xytext=(4, 3))
            axes.set_xlabel(label)
            axes.grid(color="0.9", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        left.set_xscale("log")
        left.set_ylabel(metric)
        figure.savefig(path, format="svg", metadata={"Date": None})
