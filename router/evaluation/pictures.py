"""Routing to look at: heatmaps as SVG, tokens coloured by the expert that answers them, in a terminal or as HTML."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from html import escape

import click

CELL_WIDTH, CELL_HEIGHT = 66, 24  # pixels
_LETTER = 7  # pixels of one character at font size 12


def colour(index: int) -> tuple[int, int, int]:
    """A colour for the expert of this place; golden-angle hues, so that neighbours differ however many there are."""
    red, green, blue = colorsys.hls_to_rgb((0.61 + 0.381966 * index) % 1.0, 0.58, 0.62)
    return round(255 * red), round(255 * green), round(255 * blue)


def heatmap(title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    """An SVG table of shares in [0, 1], a row a line: the darker, the larger; each cell says its value."""
    left = 20 + _LETTER * max(map(len, rows), default=0)
    top = 34 + _LETTER * max(map(len, columns), default=0)
    width, height = left + CELL_WIDTH * len(columns) + 10, top + CELL_HEIGHT * len(rows) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="10" y="18" font-weight="bold">{escape(title)}</text>',
    ]
    for j, name in enumerate(columns):
        x = left + CELL_WIDTH * j + CELL_WIDTH // 2 + 4
        parts.append(f'<text x="{x}" y="{top - 6}" transform="rotate(-90 {x} {top - 6})">{escape(name)}</text>')
    for i, name in enumerate(rows):
        y = top + CELL_HEIGHT * i
        parts.append(f'<text x="{left - 6}" y="{y + 16}" text-anchor="end">{escape(name)}</text>')
        parts += [_cell(left + CELL_WIDTH * j, y, value) for j, value in enumerate(values[i])]
    return "\n".join([*parts, "</svg>", ""])


def _cell(x: int, y: int, value: float) -> str:
    share = min(1.0, max(0.0, value))
    shade = ", ".join(str(round(255 - (255 - base) * share)) for base in (31, 92, 153))
    ink = "white" if share > 0.55 else "black"
    return (
        f'<rect x="{x}" y="{y}" width="{CELL_WIDTH - 1}" height="{CELL_HEIGHT - 1}" fill="rgb({shade})"/>'
        f'<text x="{x + CELL_WIDTH // 2}" y="{y + 16}" text-anchor="middle" fill="{ink}">{value:.2f}</text>'
    )


def in_terminal(pieces: Sequence[str], best: Sequence[int], share: Sequence[float]) -> str:
    """Tokens in the colour of the expert that weighs most for each; faint where it weighs under a half."""
    return "".join(
        click.style(piece, fg=colour(e), dim=s < 0.5) for piece, e, s in zip(pieces, best, share, strict=True)
    )


def legend(experts: Sequence[str], shares: Sequence[float]) -> str:
    """Experts in their colours with their mean weight, the largest first."""
    order = sorted(range(len(experts)), key=lambda e: -shares[e])
    return "  ".join(click.style(f"{experts[e]} {100 * shares[e]:.0f}%", fg=colour(e)) for e in order)


def page(title: str, pieces: Sequence[str], experts: Sequence[str], weights: Sequence[Sequence[float]]) -> str:
    """An HTML page: the text coloured by expert, each token with its weights, and all of it as a heatmap below."""
    tokens = []
    for piece, row in zip(pieces, weights, strict=True):
        best = max(range(len(row)), key=row.__getitem__)
        red, green, blue = colour(best)
        label = ", ".join(f"{name} {w:.2f}" for name, w in zip(experts, row, strict=True) if w >= 0.005)
        style = f"background: rgba({red}, {green}, {blue}, {0.15 + 0.75 * row[best]:.2f})"
        tokens.append(f'<span style="{style}" title="{escape(label)}">{escape(piece)}</span>')
    names = " ".join(
        '<span style="background: rgb({}, {}, {})">{}</span>'.format(*colour(e), escape(name))
        for e, name in enumerate(experts)
    )
    shown = [f"{i} {piece.strip() or '·'}" for i, piece in enumerate(pieces)]
    table = heatmap("weight of each expert, by token", shown, experts, weights)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>'
        "body { font: 15px/1.6 sans-serif; margin: 2rem; max-width: 60rem } "
        "pre { white-space: pre-wrap; font: inherit } span { border-radius: 3px; padding: 1px 0 }"
        f"</style></head><body><h1>{escape(title)}</h1><p>{names}</p><pre>{''.join(tokens)}</pre>{table}</body></html>\n"
    )
