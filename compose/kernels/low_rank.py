"""The low-rank mixture at a linear site: y + sum_e w_e s_e B_e A_e x, with w_e per batch, per row or per token.

Every backend lays the factors out once for a set of weights and then applies them; they agree with each other (a law
in the tests), so the choice is only about speed. See :func:`choose`.

Shapes: x (B, T, d_in), y (B, T, d_out), weights (R, E) or (R, T or 1, E) with B a multiple of R: row i of the batch
uses row i // (B / R) of the weights, as beams and folded experts are laid out. R = 1 is one mixture for all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Pair:
    """One expert's factors: A (r, d_in), B (d_out, r), and its scale."""

    A: Tensor
    B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """The rank r."""
        return int(self.A.shape[0])


class LowRankMixture(Protocol):
    """Factors laid out for one set of weights."""

    def __call__(self, y: Tensor, x: Tensor, *, fresh: bool = False) -> Tensor:
        """Return y plus the mixture. With ``fresh`` nobody else holds y: it may be written over."""


Backend = Callable[[Sequence[Pair], Tensor], LowRankMixture]
_CHUNK = 256  # tokens whose products with all A are held at once
_SPARE = 4  # times the ranks a token uses that may as well be computed: sorting tokens by expert costs as much
_HUGE = 1e18  # factors above: products with activations may overflow
_TINY = 2**22  # multiplications of a first factor below which sorting costs more than all of them
BACKENDS: dict[str, Backend] = {}


def backend(prepare: Backend) -> Backend:
    """Register a backend under its function's name."""
    BACKENDS[prepare.__name__] = prepare
    return prepare


def expand(weights: Tensor, batch: int) -> Tensor:
    """Repeat each of the R rows of ``weights`` to a batch of k R rows."""
    rows = weights.shape[0]
    if rows == batch:
        return weights
    _check_rows(rows, batch)
    return weights.repeat_interleave(batch // rows, dim=0)


def _check_rows(rows: int, batch: int) -> None:
    if rows == 0 or batch % rows:
        raise ValueError(
            f"the active composition has {rows} rows and the batch has {batch}: give one expression per row, "
            "or a batch that is a whole multiple"
        )


def fold(x: Tensor, rows: int) -> Tensor:
    """(k R, T, d) -> (R, k T, d): the k rows that share a row of weights stand side by side. No copy."""
    if x.shape[0] == rows:
        return x
    _check_rows(rows, x.shape[0])
    return x.reshape(rows, x.shape[0] // rows * x.shape[1], x.shape[2])


def choose(ranks: Sequence[int], weights: Tensor) -> str:
    """Name of the backend for these ranks and weights (thresholds from tests/benchmarks/bench_kernels.py).

    Per row: ``stacked`` computes every rank for every row, ``gather`` reads the ranks of each row's own experts from
    memory, which costs about as much as computing three times as many, and leaves out rows without any. Per token:
    ``stacked`` while all ranks are at most four times what a token uses, else ``grouped``, which computes only the
    experts a token uses.
    """
    total = sum(ranks)
    if weights.dim() == 3:
        active = float((weights != 0).sum(-1).float().mean()) * total / len(ranks)
        return "stacked" if total <= _SPARE * active else "grouped"
    if len(weights) == 1:
        return "stacked"
    used = weights != 0
    most = int((used * torch.tensor(ranks, device=weights.device)).sum(1).max())
    return "stacked" if total * len(weights) <= 3 * most * int(used.any(1).sum()) else "gather"


def finite(factors: Sequence[Tensor]) -> bool:
    """Whether no factor holds NaN, infinity or what may become it, which a weight of zero would not take out again."""
    return all(bool((f.abs() < _HUGE).all()) for f in factors)


def isolating(name: str, pairs: Sequence[Pair], weights: Tensor, *, live: bool = False) -> str:
    """The backend, or one that keeps rows (tokens) apart if an expert has diverged: 0 * NaN is NaN in a shared GEMM.

    Factors that train (``live``) get a gradient from the rows that use them only: another row's may have become NaN on
    its way back through some other adapter.
    """
    if name != "stacked" or (weights.dim() == 2 and len(weights) == 1):
        return name
    mixed = live and bool((weights == 0).any())
    if not mixed and finite([f for p in pairs for f in (p.A, p.B)]):
        return name
    return "gather" if weights.dim() == 2 else "grouped"


def mix(weights: Tensor, vectors: Tensor) -> Tensor:
    """sum_e w_e v_e for weights (..., E) and vectors (E, d); a vector of weight zero does not count, even a NaN."""
    learns = vectors.requires_grad and not weights.requires_grad and torch.is_grad_enabled()
    if weights.numel() == weights.shape[-1] or (not learns and finite([vectors])):
        return weights.to(vectors.dtype) @ vectors
    w = weights.to(vectors.dtype)[..., None]
    terms = w * torch.where(w == 0, 0.0, vectors)  # in this order the gradient of w is a number, too
    return (torch.where(w == 0, 0.0, terms) if learns else terms).sum(-2)


def add_rows(y: Tensor, rows: Tensor, term: Tensor, of: int, *, own: bool) -> Tensor:
    """`y` (k R, T, d) plus a term (n, k T, d) for n of its R = ``of`` rows; ``own``: y may be written over."""
    folded, term = fold(y, of), term.to(y.dtype)  # under autocast products are narrower
    if own:
        folded.index_add_(0, rows, term)
        return y
    return folded.index_add(0, rows, term).view(y.shape)


def _add_product(y: Tensor, h: Tensor, b: Tensor, fresh: bool) -> Tensor:
    """`y + h b` for y (..., d_out), h (..., k), b (k, d_out)."""
    flat, h = y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1])
    if fresh and y.is_contiguous():
        flat.addmm_(h, b)
        return y
    return torch.addmm(flat, h, b).view(y.shape)


def _add_products(y: Tensor, h: Tensor, b: Tensor, fresh: bool) -> Tensor:
    """`y + h b` for y (B, T, d_out), h (R, k T, r), b (R, r, d_out): one product a row."""
    folded = fold(y, b.shape[0])
    if fresh and y.is_contiguous():
        folded.baddbmm_(h, b)
        return y
    return torch.baddbmm(folded, h, b).view(y.shape)


@backend
def loop(pairs: Sequence[Pair], weights: Tensor) -> LowRankMixture:
    """Reference: one expert after the other over all rows. 2 E small GEMMs."""

    def run(y: Tensor, x: Tensor, *, fresh: bool = False) -> Tensor:  # noqa: ARG001
        w = expand(weights, x.shape[0])  # (B, E) or (B, T, E)
        for e, pair in enumerate(pairs):
            coefficient = w[..., e].reshape(x.shape[0], -1, 1) * pair.scale
            y = y + F.linear(F.linear(x, pair.A) * coefficient.to(x.dtype), pair.B)
        return y

    return run


@backend
def stacked(pairs: Sequence[Pair], weights: Tensor) -> LowRankMixture:
    """Concatenate mixed ranks without padding and apply the weights in rank space: two GEMMs."""
    rows = weights.shape[0]
    if rows == 1 and weights.dim() == 2:
        return for_all(pairs, list(weights[0].unbind()))
    a = torch.cat([p.A for p in pairs])  # (sum r, d_in)
    b = torch.cat([p.B.T for p in pairs])  # (sum r, d_out)
    scaled = [(weights[..., e, None] * p.scale).expand(*weights.shape[:-1], p.rank) for e, p in enumerate(pairs)]
    in_rank = torch.cat(scaled, dim=-1)  # (R, [T,] sum r)

    def run(y: Tensor, x: Tensor, *, fresh: bool = False) -> Tensor:
        h = F.linear(x, a)  # (B, T, sum r)
        if in_rank.dim() == 3:
            h = h * expand(in_rank, x.shape[0]).to(x.dtype)
        else:
            h = fold(h, rows) * in_rank[:, None].to(x.dtype)
        return _add_product(y, h, b, fresh)

    return run


def for_all(pairs: Sequence[Pair], weights: Sequence[Tensor] | None = None) -> LowRankMixture:
    """The same mixture for all rows: weights and scales go into the factors, two GEMMs remain."""
    if weights is None:
        scaled = [p.B if p.scale == 1.0 else p.B * p.scale for p in pairs]
    else:
        scaled = [(p.B * (w * p.scale)).to(p.B.dtype) for p, w in zip(pairs, weights, strict=True)]
    a = pairs[0].A if len(pairs) == 1 else torch.cat([p.A for p in pairs])  # (sum r, d_in)
    b = (scaled[0] if len(pairs) == 1 else torch.cat(scaled, dim=1)).T  # (sum r, d_out)

    def run(y: Tensor, x: Tensor, *, fresh: bool = False) -> Tensor:
        return _add_product(y, F.linear(x, a), b, fresh)

    return run


@backend
def gather(pairs: Sequence[Pair], weights: Tensor) -> LowRankMixture:
    """Give each row its own concatenated factors, then two batched GEMMs; cost is flat in the number of experts.

    Only for weights per row. Ranks are padded with zeros to the largest; rows with no expert are left out.
    """
    if weights.dim() != 2:
        raise ValueError("gather takes weights per row, not per token")
    rows, used = len(weights), (weights != 0).any(1).nonzero().flatten()
    some = len(used) < rows
    a, b = gather_factors(pairs, weights[used] if some else weights)
    a = a.transpose(1, 2)  # (n, d_in, k)

    def run(y: Tensor, x: Tensor, *, fresh: bool = False) -> Tensor:
        if not some:
            return _add_products(y, torch.bmm(fold(x, rows), a), b, fresh)
        own = fresh and y.is_contiguous()
        term = torch.bmm(torch.bmm(fold(x, rows).index_select(0, used), a), b)
        return add_rows(y, used, term, rows, own=own)

    return run


def gather_factors(pairs: Sequence[Pair], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's factors: A (R, k, d_in) and w s B (R, k, d_out) with k = (most experts of a row) * (largest rank)."""
    picked, w = picks(weights)
    unused = w == 0  # what fills up a row must add nothing, whatever it holds
    rank = max(p.rank for p in pairs)
    if len(weights) and min(p.rank for p in pairs) == rank and not bool(unused.any()):
        # Nothing to fill up, so factors are copied once.
        experts = [pairs[e] for e in picked.flatten().tolist()]
        a, b = torch.stack([p.A for p in experts]), torch.stack([p.B.T for p in experts])
        scales = w.flatten() * torch.tensor([p.scale for p in experts], device=w.device)
        if w.requires_grad or bool((scales != 1).any()):
            b = b * scales[:, None, None].to(b.dtype)
        return a.reshape(len(picked), -1, a.shape[-1]), b.reshape(len(picked), -1, b.shape[-1])
    a = torch.stack([padded(p.A, rank) for p in pairs])  # (E, r, d_in)
    b = torch.stack([padded(p.B.T * p.scale, rank) for p in pairs])  # (E, r, d_out)
    a, b = a[picked].masked_fill(unused, 0), (b[picked] * w.to(b.dtype)).masked_fill(unused, 0)
    return a.flatten(1, 2), b.flatten(1, 2)


def picks(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The experts of each row (R, most) and their weights (R, most, 1, 1); unused places have weight zero."""
    most = max(1, int((weights != 0).sum(1).max())) if len(weights) else 1
    picked = (weights != 0).to(torch.int8).topk(most, dim=1).indices
    return picked, weights.gather(1, picked)[..., None, None]


def padded(factor: Tensor, rank: int) -> Tensor:
    """(r, d) with zero rows up to ``rank``."""
    return F.pad(factor, (0, 0, 0, rank - factor.shape[0]))


@backend
def grouped(pairs: Sequence[Pair], weights: Tensor) -> LowRankMixture:
    """Sort the tokens by expert and run each expert on its own: for many experts and few a token.

    Holds each token once for every expert it uses, never (tokens, E, d_out).
    """

    def run(y: Tensor, x: Tensor, *, fresh: bool = False) -> Tensor:
        w = _by_token(weights, x)  # (N, E)
        experts, tokens = w.T.nonzero(as_tuple=True)  # sorted by expert
        used, counts = torch.unique_consecutive(experts, return_counts=True)
        shares = w[tokens, experts].to(x.dtype)[:, None]
        flat = x.reshape(-1, x.shape[-1])

        def term(e: int, at: Tensor, share: Tensor) -> Tensor:
            pair = pairs[e]
            return F.linear(F.linear(flat.index_select(0, at), pair.A) * (share * pair.scale), pair.B)

        # Each expert's tokens, one after another: a run of `tokens` each, as those are sorted by expert.
        ats = torch.split(tokens, counts.tolist())
        parts = zip(used.tolist(), ats, torch.split(shares, counts.tolist()), strict=True)
        # Autograd keeps every term anyway, so they are added at once; without it, one term is alive at a time.
        if torch.is_grad_enabled() and (
            x.requires_grad or w.requires_grad or y.requires_grad or pairs[0].A.requires_grad
        ):
            terms = [term(*part) for part in parts]
            return y.reshape(-1, y.shape[-1]).index_add(0, tokens, torch.cat(terms)).view(y.shape) if terms else y
        out = y if fresh and y.is_contiguous() else y.clone(memory_format=torch.contiguous_format)
        for part in parts:
            out.view(-1, out.shape[-1]).index_add_(0, part[1], term(*part))
        return out

    return run


def _by_token(weights: Tensor, x: Tensor) -> Tensor:
    """Weights (R, E) or (R, T or 1, E) for the tokens of x (B, T, d): (B T, E)."""
    batch, length = x.shape[:2]
    w = expand(weights, batch)
    w = w[:, None] if w.dim() == 2 else w
    return w.expand(batch, length, -1).reshape(batch * length, -1)


class Routed:
    """Factors laid out once for weights (R, T or 1, E) that are new in each call, as a gate at the site makes them.

    Experts that no token of the call uses are left out: they cost nothing and change no bit.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = tuple(pairs)
        self._ranks = [p.rank for p in pairs]
        self._laid_out: tuple[Tensor, Tensor, Tensor] | None = None
        self._diverged = False  # some expert, from which the tokens of the others must be kept apart

    def __call__(self, y: Tensor, x: Tensor, weights: Tensor, *, fresh: bool = False) -> Tensor:
        """`y` plus the mixture, by the backend that `choose` takes; all of the experts for a few tokens."""
        tiny = x.numel() * sum(self._ranks) <= _TINY
        owner, a, b = self._factors()
        # Experts apart cost less where a token uses few of many, and are needed where one has diverged: 0 * inf is NaN.
        if self._diverged or (not tiny and choose(self._ranks, weights) == "grouped"):
            return grouped(self.pairs, weights)(y, x, fresh=fresh)
        w = _by_token(weights, x).to(x.dtype)  # (N, E)
        used = (w != 0).any(0)
        if not bool(used.all()):  # columns of experts that no token of this call uses
            kept = used[owner].nonzero().flatten()
            owner, a, b = owner[kept], a[kept], b[kept]
        if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad or y.requires_grad):
            h = F.linear(x.reshape(-1, x.shape[-1]), a) * w[:, owner]  # (N, sum r)
            return _add_product(y, h, b, fresh=False)
        out = y if fresh and y.is_contiguous() else y.clone(memory_format=torch.contiguous_format)
        parts = (out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1]), w)
        # In chunks of tokens: the products with all A, (N, sum r), never lie in memory whole.
        for out_, x_, w_ in zip(*(torch.split(t, _CHUNK) for t in parts), strict=True):
            out_.addmm_(F.linear(x_, a).mul_(w_[:, owner]), b)
        return out

    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The expert of each rank (sum r,), all A (sum r, d_in) and all s B^T (sum r, d_out)."""
        if self._laid_out is None:
            with torch.inference_mode(False):
                owners = [torch.full((rank,), e) for e, rank in enumerate(self._ranks)]
                a, b = torch.cat([p.A for p in self.pairs]), torch.cat([p.B.T * p.scale for p in self.pairs])
                self._laid_out = torch.cat(owners).to(a.device), a, b
                self._diverged = not finite([a, b])
        return self._laid_out
