"""Atoms: the few things every kind lowers to.

At a linear site with y0 = W x (bias c0 kept outside) an expert e contributes with weight w_e

    y = y0 * (1 + sum_e w_e (g_e - 1)) + sum_e w_e (s_e B_e A_e x + D_e x)
    c = c0 * (1 + sum_e w_e (g_e - 1) [g_e scales the bias]) + sum_e w_e (b_e + F_e(y0 + c0))

and an input gain l_e replaces x in y0 by x * (1 + sum_e w_e (l_e - 1)). A kind whose gain also scales its own delta
(DoRA) folds it into B. Prefix and prompt atoms act at the attention and at the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compose.kernels.fused_rows import FusedRows
from compose.kernels.maps import Dense, Lifted, LinearMap


@dataclass(frozen=True)
class Function:
    """A block function F added to a site's output.

    ``fn`` maps (..., d) to (..., d_out). It reads the site's own output, or with ``tap`` the *input* of the site at
    that path (a parallel adapter reads what enters the feed-forward block); the runtime then sets ``source``.
    """

    fn: Callable[[Tensor], Tensor]
    tap: str | None = None
    source: Callable[[], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Block:
    """`z -> s (U f(D z + b) + u)`, D (m, d), U (d_out, m), in their precision; rows of a batch can have theirs at once.

    ``activation`` is the name of f: equal names are equal functions.
    """

    down: Tensor
    down_b: Tensor
    up: Tensor
    up_b: Tensor
    activation: str
    act: Callable[[Tensor], Tensor]
    scale: float = 1.0
    dropout: float = 0.0

    def __call__(self, z: Tensor) -> Tensor:
        """The block of z (..., d), some of which is dropped while training."""
        z = F.dropout(z, self.dropout) if self.dropout else z
        return self.scale * F.linear(
            self.act(F.linear(z.to(self.down.dtype), self.down, self.down_b)), self.up, self.up_b
        )


@dataclass(frozen=True)
class Replace:
    """A module that takes the place of the base module: F(x) = M(x) - y0, so a weight of one gives M(x).

    ``alone`` says why nothing else can stand beside it, where so.
    """

    fn: Callable[[Tensor], Tensor]
    alone: str | None = None


@dataclass(frozen=True)
class Moved:
    """Other values of the base module's own parameters: F(x) = M(p + delta)(x) - M(p)(x), where M is affine in p.

    ``deltas`` gives the deltas by the name of the parameter.
    """

    fn: Callable[[Tensor], Tensor]
    deltas: Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Side:
    """A network beside the model, at the pseudo-site of the final states h: it adds F(h, trace) to them.

    ``fn`` reads the hidden states of the call under way from its trace (:mod:`compose.slots.side`); how to get at that,
    the runtime sets.
    """

    fn: Callable[[Tensor, Any], Tensor]
    trace: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Atoms:
    """What one adapter does at one site.

    Shapes: A (r, d_in), B (d_out, r), gain and bias (d_out,), input_gain (d_in,), delta (d_out, d_in).
    """

    A: Tensor | None = None
    B: Tensor | None = None
    scale: float = 1.0
    gain: Tensor | None = None
    gain_scales_bias: bool = False
    input_gain: Tensor | None = None
    bias: Tensor | None = None
    delta: LinearMap | None = None
    function: Function | Replace | Moved | Side | None = None
    dropout: float = 0.0

    @property
    def is_pair(self) -> bool:
        """Nothing but a low-rank pair."""
        return self.A is not None and self.additive and self.bias is None and self.delta is None

    @property
    def additive(self) -> bool:
        """True if the contribution does not read or scale y0: such atoms commute with everything before them."""
        return self.gain is None and self.input_gain is None and self.function is None

    def lifted(self, rows: FusedRows, *, part: bool) -> Atoms:
        """What these atoms do to ``rows`` of a fused output, and nothing to its other rows.

        They are those of the ``part`` that the rows are, or of the whole. An input gain has no such form: the rows
        share their input.
        """

        def lift(own: Tensor, dim: int = -1) -> Tensor:
            return rows.into(own if part else rows.of(own, dim), dim)

        function = self.function
        if isinstance(function, Function):
            fn, reads = function.fn, rows.of if part and function.tap is None else None
            function = replace(function, fn=lambda z: lift(fn(z if reads is None else reads(z))))
        return replace(
            self,
            B=None if self.B is None else lift(self.B, 0),
            gain=None if self.gain is None else 1 + lift(self.gain - 1),
            bias=None if self.bias is None else lift(self.bias),
            delta=None if self.delta is None else Lifted(self.delta, lift),
            function=function,
        )

    @property
    def shift(self) -> Mapping[str, Tensor] | None:
        """Whole deltas of the module's own parameters, by name, if these atoms are nothing else."""
        if self.A is not None or self.gain is not None or self.input_gain is not None:
            return None
        if isinstance(self.delta, Dense) and self.function is None:
            bias = {} if self.bias is None else {"bias": self.bias}
            return {"weight": self.delta.weight, **bias}
        return self.function.deltas() if isinstance(self.function, Moved) else None


@dataclass(frozen=True)
class Prefix:
    """Keys and values put before a self-attention's own: each (n, kv_heads, head_dim).

    ``moves``: the text stands at n, n + 1, ... behind them, else at 0, 1, ... as without. ``slides``: where
    attention has a window, they leave it as tokens before the text would, else all of the text sees them.
    """

    key: Tensor
    value: Tensor
    moves: bool = True
    slides: bool = False


@dataclass(frozen=True)
class Prompt:
    """Embeddings (n, d) put before the input embeddings.

    ``of`` makes them anew for each text, (B, n) ids of its first tokens -> (B, n, d); ``embeddings`` is a blank then.
    """

    embeddings: Tensor
    of: Callable[[Tensor], Tensor] | None = None


class Below(Protocol):
    """The linear map W' that an adapter sits on: the frozen layer with the stages before it, bias left out."""

    def apply(self, x: Tensor) -> Tensor:
        """`W' x` for x (..., d_in)."""

    def row_norm_squared(self) -> Tensor:
        """||W'||^2 of each output row, (d_out,), float32."""

    @property
    def layer(self) -> nn.Module:
        """The frozen base layer, to be read; what it computes is :meth:`forward`."""

    def forward(self, *args: Any) -> Any:
        """What the base layer computes, bias included, without any adapter."""

    @property
    def device(self) -> torch.device:
        """Where W' lives."""
