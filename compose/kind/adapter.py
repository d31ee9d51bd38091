"""The contract of a kind: a frozen config and a module of tensors that lowers to atoms at sites.

A kind is one file under ``compose/kinds/`` (or any package's ``hub.kinds`` entry point)::

    @register("bias")
    class Bias(Adapter):
        Config = BiasConfig
        ...

Saving, loading, the CLI, the docs table and the contract tests follow from the registration.
"""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from transformers import PreTrainedModel

from compose.atoms import Atoms, Below, Prefix, Prompt
from compose.base.sites import Site, SiteMap
from compose.errors import KindError, SiteError
from compose.kind.tensors import NamedTensors


class KindConfig(BaseModel):
    """Fields every kind shares."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    target_modules: tuple[str, ...] | str | None = Field(
        None,
        description='roles ("attn.q"), PEFT-style suffixes ("q_proj"), or "all-linear"; default: the paper\'s sites',
    )
    layers: tuple[int, ...] | None = Field(None, description="only these layers (0-based)")
    modules_to_save: tuple[str, ...] = Field((), description="base modules trained and stored whole, e.g. the head")


class Adapter(NamedTensors):
    """One trained parameter set: the tensors of a kind, named by site, and how they lower to atoms.

    Subclasses set the class attributes, fill ``self`` with :meth:`add` in ``build`` and answer :meth:`lower`
    (linear sites), :meth:`prefix` (attention) or :meth:`prompt` (embedding).
    """

    Config: ClassVar[type[KindConfig]]
    peft_type: ClassVar[str | None] = None
    peft_aliases: ClassVar[tuple[str, ...]] = ()  # other PEFT types whose files it reads
    paper: ClassVar[str] = ""
    averages_in_weight: ClassVar[bool] = True  # an average of parameters is a weighted sum of effects
    reads_below: ClassVar[bool] = False  # lowering looks at the weight underneath (DoRA's norm)
    adapts_tables: ClassVar[bool] = False  # the input embeddings can be a target
    default_targets: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v", "attn.qkv")
    peft_fields: ClassVar[frozenset[str]] = frozenset()  # of PEFT's config: read here, or without effect on outputs

    config: KindConfig

    def __init__(
        self, config: KindConfig, sites: SiteMap, model: PreTrainedModel, *, name: str, seed: int | None = None
    ) -> None:
        super().__init__(name)
        self.config = config
        self.grown: dict[str, str] = {}  # tables of a vocabulary that was resized for it, by their keys in PEFT's file
        self.labels: tuple[str, ...] = ()  # names of the classes of its head, where known
        self._frozen = False
        self.home: weakref.ref[Any] | None = None  # the runtime it is resident in, which then lowers it anew
        self._generator = torch.Generator().manual_seed(0 if seed is None else seed)
        self.paths: tuple[str, ...] = ()  # of the sites: a part of a fused linear has one of its own
        self.build(sites, model)
        self.module_paths = tuple(dict.fromkeys(map(sites.module_of, self.paths)))  # where its sites lie
        for path in _modules_to_save(model, config.modules_to_save):
            self._carry(path, model.get_submodule(path))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "home": None}  # a copy is resident nowhere

    # -- to be written by a kind ---------------------------------------------------------------------------------

    def build(self, sites: SiteMap, model: PreTrainedModel) -> None:
        """Create the parameters, initialized from ``self.generator``, and set ``self.paths``."""
        raise KindError(f"kind {self.kind!r} does not build anything")

    def lower(self, path: str, below: Below) -> Atoms | None:
        """Atoms at the site ``path``, or None. Called anew each forward while the adapter trains."""
        return None

    def prefix(self, path: str) -> Prefix | None:
        """Prefix of the attention module at ``path``, or None."""
        return None

    def prompt(self) -> Prompt | None:
        """Prompt before the input embeddings, or None."""
        return None

    @classmethod
    def peft_config(cls, config: KindConfig, sites: SiteMap) -> dict[str, Any]:
        """Fields of PEFT's adapter_config.json for this config (only kinds with a ``peft_type``)."""
        return {}

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Config fields read from PEFT's adapter_config.json; refuses by name what this kind cannot express."""
        raise KindError(f"kind {cls.kind!r} has no PEFT form: {sorted(fields)}")

    # -- what every kind gets ------------------------------------------------------------------------------------

    @property
    def identity_at_init(self) -> bool:
        """Whether a fresh adapter leaves the base's outputs exactly as they are."""
        return True

    @property
    def generator(self) -> torch.Generator:
        """The seeded stream initial values are drawn from."""
        return self._generator

    @property
    def trainable(self) -> bool:
        """Live: lowered anew in each forward, with gradient."""
        return not self._frozen

    def freeze(self) -> Adapter:
        """Stop training: factors are gathered once and cached. Undone by :meth:`unfreeze`."""
        self._frozen = True
        self.requires_grad_(False)
        self.changed()
        return self

    def unfreeze(self) -> Adapter:
        """Train (again)."""
        self._frozen = False
        self.requires_grad_(True)
        self.changed()
        return self

    def changed(self) -> None:
        """Say that what a model has lowered of this adapter is no longer so."""
        self.revision += 1
        home = None if self.home is None else self.home()
        if home is not None:
            home.adapter_changed()

    @property
    def acts_on_parts(self) -> bool:
        """Whether some of its sites are parts of fused linears."""
        return not set(self.paths) <= set(self.module_paths)

    def targets(self, sites: SiteMap, *, default: tuple[str, ...] | None = None) -> list[Site]:
        """Sites the config asks for, or the default roles (those of them that the family has)."""
        wanted = self.config.target_modules
        if wanted is not None:
            chosen = sites.select(wanted, layers=self.config.layers)
            if not self.adapts_tables and any(s.role == "embed" for s in chosen):
                raise KindError(f"kind {self.kind!r} acts on linear layers, not on the embeddings {sites.embedding}")
            # A module that is carried whole is not adapted as well (PEFT's rule too).
            carried = tuple(f".{name}." for name in self.config.modules_to_save)
            return [s for s in chosen if not any(name in f".{s.path}." for name in carried)]
        default = default or self.default_targets
        present = tuple(t for t in default if sites.with_role(t))
        if not present:
            raise SiteError(
                f"kind {self.kind!r} acts at {', '.join(default)} and this {sites.model_type} model has none",
                hint="give target_modules yourself",
            )
        return sites.select(present, layers=self.config.layers)


def _modules_to_save(model: nn.Module, names: Sequence[str]) -> Iterator[str]:
    if not names:
        return
    paths = [p for p, _ in model.named_modules() if p and "saved:" not in p]
    for name in names:
        matches = [p for p in paths if p == name or p.endswith("." + name)]
        if not matches:
            near = difflib.get_close_matches(name, {p.rsplit(".", 1)[-1] for p in paths}, n=2)
            raise SiteError(f"modules_to_save names {name!r}, which this base does not have", hint=f"near: {near}")
        yield from matches
