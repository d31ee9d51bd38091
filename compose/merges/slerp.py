"""Spherical interpolation of two task vectors (Shoemake, SIGGRAPH 1985)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from compose.parameter_space.method import linear

_PARALLEL = 1e-6  # sine of an angle under which the great circle is the straight line


@linear("slerp", paper="doi:10.1145/325165.325242", from_gram=True)
def slerp(o: Any, gram: Tensor) -> list[float]:
    """sin((1 - t) W) / sin W tau_0 + sin(t W) / sin W tau_1, W the angle between tau_0 and tau_1 at each place.

    Parallel vectors, and opposite ones, between which no great circle is distinguished, are interpolated linearly.
    """
    t = o.t
    norms = math.sqrt(max(0.0, float(gram[0, 0] * gram[1, 1])))
    angle = math.acos(max(-1.0, min(1.0, float(gram[0, 1]) / norms))) if norms > 0 else 0.0
    if math.sin(angle) < _PARALLEL:
        return [1 - t, t]
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
