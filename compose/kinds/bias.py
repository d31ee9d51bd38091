"""BitFit: train the biases only (arXiv:2106.10199)."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from compose.atoms import Atoms, Below
from compose.base.sites import SiteMap
from compose.base.weights import acts_on_features, bias_of
from compose.kind.adapter import Adapter, KindConfig
from compose.kind.registry import register


class BiasConfig(KindConfig):
    """No options of its own. By default every module in the model that has a bias; with none, all linear sites."""


@register("bias")
class Bias(Adapter):
    """`y = W x + c + b` with b (d_out,), a delta to the module's own bias, starting at zero.

    Linears and normalization layers alike. A base without biases (LLaMA, T5) gets zero ones at its linear sites.
    """

    Config = BiasConfig
    paper = "arXiv:2106.10199"
    suffixes = {"b": "bias_delta"}

    def build(self, sites: SiteMap, model: PreTrainedModel) -> None:
        """One vector a module."""
        if self.config.target_modules is None:
            modules = [s.path for s in sites if self.config.layers is None or s.layer in self.config.layers]
            biased = [p for p in modules if bias_of(model.get_submodule(p)) is not None]
            if biased and self.config.layers is None:
                norms = {p: model.get_submodule(p) for p in sites.norms}
                biased += [p for p, m in norms.items() if bias_of(m) is not None and acts_on_features(m)]
            chosen = biased or modules
        else:
            chosen = [s.path for s in self.targets(sites)]
        self.paths = tuple(chosen)
        for path in chosen:
            norm = None if path in sites.paths else bias_of(model.get_submodule(path))
            self.add(path, "b", torch.zeros(sites[path].out_features if norm is None else len(norm)))

    def lower(self, path: str, below: Below) -> Atoms | None:
        """The bias delta."""
        return Atoms(bias=self.at(path, "b")) if path in self.paths else None
