"""LoRA: a low-rank delta at linear sites (arXiv:2106.09685), and its rank-stabilized scale (arXiv:2312.03732)."""

from __future__ import annotations

from compose.atoms import Atoms, Below
from compose.kind import register
from compose.lowrank import LowRank


@register("lora")
class Lora(LowRank):
    """y = W x + s B A x with A (r, d_in), B (d_out, r), s = lora_alpha / r (or / sqrt(r) with ``use_rslora``)."""

    paper = "arXiv:2106.09685"

    def lower(self, path: str, below: Below) -> Atoms | None:
        """The pair (A, B) with its scale."""
        if path not in self.paths:
            return None
        a, b = self.at(path, "A"), self.at(path, "B")
        return Atoms(A=a, B=b, scale=self.config.scale, dropout=self.dropout)
