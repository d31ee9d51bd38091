"""The report's figures as SVG text that takes the page's colours.

Text and axes are drawn in a stand-in colour that becomes `currentColor`, and nothing is filled behind, so one figure
serves light and dark pages. Sizes are those of a phone; wider pages scale them up a little or set them side by side.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from train.quickstart.experts import Expert
from train.quickstart.measure import DomainResult, StreamResult

WIDTH = 4.3  # inches
_INK = "#123456"  # becomes currentColor
PALETTE = ("#2a7fb8", "#d9822b", "#b0559e", "#3f9b57", "#8a6fdf", "#c8525a", "#7a8b2f", "#4aa3a2")
_GREY = "#8c8c8c"
_STYLE: Mapping[str, Any] = {
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "quickstart",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def colour(index: int) -> str:
    """Colour of the expert at a position, the same in all figures."""
    return PALETTE[index % len(PALETTE)]


def bars(result: DomainResult) -> str:
    """Perplexity of every way to predict one domain."""
    rows = [("base", result.base, _GREY)]
    rows += [(f"expert {name}", value, colour(i)) for i, (name, value) in enumerate(result.experts.items())]
    rows += [
        ("average of weights", result.average, _GREY),
        ("uniform ensemble", result.uniform_ensemble, _GREY),
        ("DEMix posterior", result.demix, _INK),
    ]

    def draw(axes: Axes) -> None:
        names, values, colours = zip(*reversed(rows), strict=True)
        axes.barh(names, values, color=colours, height=0.7)
        for y, value in enumerate(values):
            axes.annotate(f"{value:.1f}", (value, y), (3, 0), textcoords="offset points", va="center", fontsize=8)
        axes.axvline(result.best_expert, color=_INK, linewidth=0.6, linestyle=":")
        axes.set_xlim(0, max(values) * 1.16)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("perplexity per token")

    title = f"Perplexity on {result.name}: " + ", ".join(f"{name} {value:.1f}" for name, value, _ in rows)
    return svg(draw, 0.27 * len(rows) + 0.65, title)


def posterior_path(stream: StreamResult, gamma: float) -> str:
    """Weights of the experts along the first stream, stacked to one; borders where the domain changes."""
    path = stream.paths[gamma]

    def draw(axes: Axes) -> None:
        steps = range(1, len(path) + 1)
        weights = [path[:, i].tolist() for i in range(path.shape[1])]
        axes.stackplot(steps, weights, colors=[colour(i) for i in range(len(weights))], linewidth=0)
        ends = [*stream.borders[1:], len(path)]
        order = list(stream.experts)
        for name, start, end in zip(stream.domains, stream.borders, ends, strict=True):
            if start:
                axes.axvline(start + 0.5, color=_INK, linewidth=0.8)
            axes.text((start + end) / 2, 1.03, name, ha="center", color=colour(order.index(name)), weight="bold")
        axes.set(xlim=(1, len(path)), ylim=(0, 1), xlabel="token", ylabel="weight of the expert")

    return svg(draw, 2.1, f"Posterior path with gamma {gamma:g} over {', then '.join(stream.domains)}")


def gammas(stream: StreamResult) -> str:
    """Perplexity on the streams against the discount of evidence."""

    def draw(axes: Axes) -> None:
        names = [f"{gamma:g}" for gamma in stream.by_gamma]
        axes.plot(names, list(stream.by_gamma.values()), "o-", color=_INK, markersize=4, label="DEMix posterior")
        levels = [("uniform ensemble", stream.uniform_ensemble, "--"), ("own experts", stream.oracle, ":")]
        for label, value, style in [("best single expert", min(stream.experts.values()), "-."), *levels]:
            axes.axhline(value, color=_GREY, linewidth=1, linestyle=style, label=label)
        axes.set(xlabel="gamma: 0 forgets all but one token, 1 forgets nothing", ylabel="perplexity per token")
        axes.legend(fontsize=8, loc="best")

    return svg(draw, 2.6, "Perplexity on the streams against gamma")


def certainty(results: Sequence[DomainResult]) -> str:
    """Mean weight that a document's own expert has after t tokens."""

    def draw(axes: Axes) -> None:
        for index, result in enumerate(results):
            own = list(result.experts).index(result.name)
            paths = [document.path[:, own] for document in result.documents]
            length = max(len(path) for path in paths)
            mean = [_mean_at(paths, t) for t in range(length)]
            axes.plot(range(1, length + 1), mean, color=colour(index), label=result.name, linewidth=1.5)
        axes.set(xscale="log", ylim=(0, 1.02), xlabel="tokens read", ylabel="weight of the own expert")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.legend(fontsize=8, loc="lower right")

    return svg(draw, 2.6, "Mean weight of a document's own expert after t tokens")


def _mean_at(paths: Sequence[Tensor], t: int) -> float:
    """Mean over the documents; one that has ended keeps its last weight."""
    return sum(float(path[min(t, len(path) - 1)]) for path in paths) / len(paths)


def training_curves(experts: Sequence[Expert]) -> str:
    """Training loss of each expert: every step thin, a running mean thick."""

    def draw(axes: Axes) -> None:
        for index, expert in enumerate(experts):
            steps, losses = zip(*expert.curve, strict=True)
            axes.plot(steps, losses, color=colour(index), linewidth=0.6, alpha=0.4)
            axes.plot(steps, _running_mean(losses), color=colour(index), linewidth=1.6, label=expert.domain)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="step", ylabel="training loss, nats per token")
        axes.legend(fontsize=8, loc="best")

    return svg(draw, 2.6, "Training loss of each expert")


def _running_mean(values: Sequence[float], span: int = 8) -> list[float]:
    means = []
    for i in range(len(values)):
        window = values[max(0, i - span + 1) : i + 1]
        means.append(sum(window) / len(window))
    return means


def svg(draw: Callable[[Axes], None], height: float, title: str) -> str:
    """Draw into an SVG element without size, background or ids that could clash with another figure's."""
    with mpl.rc_context(dict(_STYLE)):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.subplots()
        axes.patch.set_visible(False)
        draw(axes)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    tag = re.sub(r'\s(?:width|height|xmlns:xlink|version)="[^"]*"', "", text[: text.index(">")])
    text = tag + f' role="img" aria-label="{_escape(title)}"' + text[text.index(">") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    mark = re.sub(r"\W+", "-", title.split(":", 1)[0]).lower()
    return re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{mark}-", text)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
