"""Sites: the neutral names of the places in a model where an adapter can act.

A site is a module path with a role (``attn.q``, ``mlp.down``, ...), a layer number and, for encoder-decoders, a
stack. Kinds and users ask for sites by role, by PEFT-style suffix (``q_proj``), or ``all-linear``. The parts of a fused
linear are sites too: q of GPT-2's ``h.0.attn.c_attn`` is ``h.0.attn.c_attn.q``, with the role and shape it would have
if it were a linear of its own.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compose.base.families import FAMILIES, FUSED, PARTS, POSITIONS, UNCALLED, guess_role
from compose.base.text_config import text_config
from compose.errors import SiteError
from compose.kernels.fused_rows import FusedRows

FINAL = "@final"  # the pseudo-site of the backbone's final states
_BLOCK = re.compile(r"^(?P<stem>.*?)(?:^|\.)(?P<layer>\d+)\.(?P<inside>.+)$")


@dataclass(frozen=True)
class Site:
    """One place: module ``path``, neutral ``role``, ``layer`` in its ``stack`` ("" unless encoder-decoder)."""

    path: str
    role: str
    layer: int | None
    stack: str
    in_features: int
    out_features: int
    rows: FusedRows | None = None  # of a part: those of the fused linear that are its own

    @property
    def module(self) -> str:
        """Path of the module that computes it: for a part, that of the whole."""
        return self.path if self.rows is None else self.path.rpartition(".")[0]

    def share(self, whole: Tensor) -> Tensor:
        """What belongs to this site of a tensor with one row (its first dimension) for each output of the module."""
        return whole if self.rows is None else self.rows.of(whole, 0)

    @property
    def name(self) -> str:
        """Neutral name, e.g. ``3.attn.q`` or ``decoder.0.cross.k``."""
        return ".".join(p for p in (self.stack, None if self.layer is None else str(self.layer), self.role) if p)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return ``(d_in, d_out)`` of a linear-like module (nn.Linear, its quantized forms, GPT-2's Conv1D), else None."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.nf)
    if isinstance(module, nn.Linear) and _is_linear(module):
        return module.in_features, module.out_features
    return None


def _is_linear(module: nn.Linear) -> bool:
    """Whether it does what its name says: routers of experts derive from nn.Linear, and choose experts as well."""
    cls = type(module)
    # bitsandbytes' Linear4bit and Linear8bitLt compute the product in their own way.
    if cls.forward is nn.Linear.forward or cls.__module__.startswith("bitsandbytes."):
        return True
    weight, training = module.weight, module.training
    if not weight.is_floating_point():
        return False
    module.training = False
    try:
        with torch.no_grad():
            x = torch.linspace(-1, 1, 2 * module.in_features).reshape(2, -1).to(weight)
            y, expected = module(x), nn.functional.linear(x, weight, module.bias)
    except (RuntimeError, TypeError, ValueError, IndexError):  # it takes something else
        return False
    finally:
        module.training = training
    same = isinstance(y, Tensor) and y.shape == expected.shape
    return same and (weight.is_meta or isinstance(weight.data, FakeTensor) or torch.allclose(y, expected))


def _shared(path: str, other: str) -> int:
    """How many modules two paths have in common."""
    pairs = enumerate(zip(path.split("."), other.split("."), strict=False))
    return next((i for i, (a, b) in pairs if a != b), len(path.split(".")))


def _text_model(model: PreTrainedModel) -> str:
    """Path of the model inside ``model`` that has its text config; "" where that is the model's own."""
    config = text_config(model.config)
    if config is model.config:
        return ""
    return next((path for path, m in model.named_modules() if getattr(m, "config", None) is config), "")


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that looks up a model's tokens; None for models of images or sounds, and some others."""
    try:
        found = cast("PreTrainedModel", model).get_input_embeddings()
    except (AttributeError, NotImplementedError):  # transformers says of some models that they have none to tell
        found = getattr(model, "embed_tokens", None)
    return found if isinstance(found, nn.Module) else None


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that makes logits of tokens; None for models of images or sounds, and others without one."""
    try:
        found = cast("PreTrainedModel", model).get_output_embeddings()
    except (AttributeError, NotImplementedError):  # transformers says of some models that they have none to tell
        return None
    return found if isinstance(found, nn.Module) else None


def fused_experts(model: nn.Module) -> str | None:
    """A parameter that holds experts as its rows: then they are no layers, and adapters of such have no place."""
    return next((name for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3), None)


def _is_uncalled(path: str, modules: Mapping[str, nn.Module]) -> bool:
    parent, _, name = path.rpartition(".")
    return (type(modules[parent]).__name__, name) in UNCALLED


class SiteMap:
    """All sites of one model, and the modules around them that input-side kinds need.

    Raises
    ------
    SiteError
        If the model has no linear layer inside a numbered block: then it is no transformer we know how to adapt.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model_type: str = getattr(model.config, "model_type", "")
        self.config = text_config(model.config)
        self.known_family = self.model_type in FAMILIES
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        modules = dict(model.named_modules())
        # Linear layers in the blocks: the only places where adapters act unasked, so a model without any is refused.
        self.sites: dict[str, Site] = {s.path: s for s in self._find(modules)}
        if not self.sites:
            raise SiteError(
                f"{type(model).__name__} ({self.model_type or 'unknown type'}) has no linear layer in a numbered block",
                hint="hub compose sites BASE lists what can be adapted",
            )
        # Parts of fused linears by the path of the whole; acted on where a target names them, never by default.
        self.parts: dict[str, tuple[Site, ...]] = {s.path: p for s in self if (p := tuple(self._cut(s)))}
        # Left out of roles and of all-linear: an adapter there would do nothing.
        self.uncalled = frozenset(s.path for s in self if _is_uncalled(s.path, modules))
        self.outside: dict[str, Site] = {s.path: s for s in self._find_outside(modules)}
        self.fused_experts = fused_experts(model)
        # As the model was when this was read: slots that stand in it later are not among them.
        self.modules = tuple(path for path in modules if path)
        self.architecture = type(model).__name__
        # Beside a model of images or sounds, the one that reads the text: prompts, prefixes and side networks are its.
        self.text = "" if self.is_encoder_decoder else _text_model(model)
        # A prompt goes in where the text does: before the encoder, if there is one; a prefix acts in the decoder.
        reader = model.get_encoder() if self.is_encoder_decoder else model
        table = input_embeddings(reader) or (input_embeddings(modules[self.text]) if self.text else None)
        self.embedding = next((p for p, m in modules.items() if m is table), "")
        logits = output_embeddings(model)
        self.output = next((p for p, m in modules.items() if m is logits), "")
        self.positions = tuple(
            p
            for p in modules
            if p.rsplit(".", 1)[-1] in POSITIONS
            and self.reads_text(p)
            and not (self.is_encoder_decoder and self._stack_of(p) == "encoder")
        )
        # Whether the stack that reads the text looks back only, so that its keys can be cached.
        first = next((modules[p] for _, p in self.attention_modules()), None)
        self.reads_causally = not self.is_encoder_decoder and bool(getattr(first, "is_causal", model.can_generate()))
        self.norms = tuple(p for p, m in modules.items() if type(m).__name__.endswith(("Norm", "NormWrapper")))
        # Tables of embeddings: the input's can be adapted by kinds that say so, the others (positions) by none.
        self.tables = tuple(p for p, m in modules.items() if isinstance(m, nn.Embedding))
        self.input_table: Site | None = None
        if self.embedding in self.tables:
            rows, width = cast("nn.Embedding", modules[self.embedding]).weight.shape
            self.input_table = Site(self.embedding, "embed", None, "", int(rows), int(width))
        # All that a path can name, for whoever asks by path.
        parts = {part.path: part for parts in self.parts.values() for part in parts}
        tables = {s.path: s for s in (self.input_table,) if s is not None}
        self._every: dict[str, Site] = {**self.sites, **parts, **self.outside, **tables}

    def _find(self, modules: dict[str, nn.Module]) -> Iterator[Site]:
        table = FAMILIES.get(self.model_type, {})
        for path, module in modules.items():
            shape, block = linear_shape(module), _BLOCK.match(path)
            if shape is None or block is None:
                continue
            inside = block["inside"]
            role = next((r for s, r in table.items() if inside == s or inside.endswith("." + s)), None)
            if self.known_family and inside in table:  # an exact match wins over a longer suffix (BERT's output.dense)
                role = table[inside]
            role = role or guess_role(inside) or "linear." + inside
            stack = self._stack_of(path) if self.is_encoder_decoder else ""
            in_features, out_features = shape
            yield Site(path, role, int(block["layer"]), stack, in_features, out_features)

    @staticmethod
    def _stack_of(path: str) -> str:
        """The stack of an encoder-decoder: a decoder may be called ``decoder.bert.encoder`` inside."""
        return next((part for part in path.split(".") if part in ("encoder", "decoder")), "")

    def _cut(self, whole: Site) -> Iterator[Site]:
        """The parts of a linear that holds several, if its family is known to lay them out so."""
        cut = FUSED.get(self.model_type, {}).get(whole.role)
        if cut is None:
            return
        groups, shares = cut(self.config)
        run, rest = divmod(whole.out_features, groups)
        unit, odd = divmod(run, sum(shares))
        if rest or odd:
            raise SiteError(f"{whole.path} has {whole.out_features} outputs, which are no {groups} x {shares} heads")
        stops = list(accumulate(unit * share for share in shares))
        for role, start, stop in zip(PARTS[whole.role], [0, *stops], stops, strict=False):
            rows, path = FusedRows(groups, run, start, stop), f"{whole.path}.{role.rpartition('.')[2]}"
            yield Site(path, role, whole.layer, whole.stack, whole.in_features, len(rows), rows)

    @staticmethod
    def _find_outside(modules: dict[str, nn.Module]) -> Iterator[Site]:
        """Linear layers outside the blocks (poolers, heads): acted on where a target names them, never by default."""
        for path, module in modules.items():
            shape = linear_shape(module)
            if shape is not None and not _BLOCK.match(path):
                yield Site(path, "outside." + path, None, "", *shape)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states.

        Raises
        ------
        SiteError
            They have different widths in different layers.
        """
        width = getattr(self.config, "hidden_size", None)
        if not isinstance(width, int):
            raise SiteError(
                f"{self.architecture} has no one width of its hidden states, which this kind needs",
                hint="`hub compose kinds` lists those that act at linear layers",
            )
        return width

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all sites, parts of fused ones, those outside the blocks and the input embeddings too."""
        return tuple(self._every)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites.values())

    def __getitem__(self, path: str) -> Site:
        return self._every[path]

    def module_of(self, path: str) -> str:
        """Path of the module that a site lies in: of the whole for a part of it, the same path for anything else."""
        return self._every[path].module if path in self._every else path

    def rows_of(self, path: str) -> FusedRows | None:
        """Which rows of its module's output a part of a fused linear is; None for anything else."""
        return self._every[path].rows if path in self._every else None

    @staticmethod
    def layer_of(path: str) -> int | None:
        """Number of the block that a module lies in, None outside the blocks."""
        block = _BLOCK.match(path)
        return None if block is None else int(block["layer"])

    @staticmethod
    def block_of(path: str) -> str:
        """Path of the block that a module lies in, "" outside the blocks."""
        block = _BLOCK.match(path)
        return "" if block is None else path[: -len(block["inside"]) - 1]

    def with_role(self, *roles: str) -> list[Site]:
        """Sites whose role is one of ``roles``, in model order."""
        return [s for s in self if s.role in roles]

    def entry_beside(self, site: Site) -> Site:
        """The first linear that the feed-forward block of the site's layer feeds: its input is the block's."""
        entries = self.with_role("mlp.up", "mlp.gate", "mlp.gate_up")
        near = [s for s in entries if (s.layer, s.stack) == (site.layer, site.stack)]
        # The first of those that share most of the path: a stage of windows (Swin) has blocks of its own.
        found = max(near, key=lambda s: _shared(s.path, site.path), default=None)
        if found is None:
            raise SiteError(f"no feed-forward input is known beside {site.path}, which this adapter reads")
        return found

    def reads_text(self, path: str) -> bool:
        """Whether a module is part of the model that reads the text, as all are but in models of several senses."""
        return not self.text or path.startswith(self.text + ".")

    def passes_text(self, path: str) -> bool:
        """Whether a text goes through a module: in the model that reads it, or behind that one (heads)."""
        beside = self.text.rpartition(".")[0]  # what holds the text's model and those of other senses
        behind = path == self.output if not beside else not path.startswith(beside + ".")
        return behind or self.reads_text(path)

    def attention_modules(self) -> list[tuple[Site, str]]:
        """Self-attention modules as (a key site, module path): the parents of ``attn.k`` or ``attn.qkv``, by layer."""
        keys = self.with_role("attn.k", "attn.qkv")
        return [(s, s.path.rsplit(".", 1)[0]) for s in keys if self.reads_text(s.path)]

    def select(self, targets: Sequence[str] | str, *, layers: Sequence[int] | None = None) -> list[Site]:
        """Sites named by ``targets``: roles, path suffixes as in PEFT, whole paths, or ``"all-linear"``.

        Every target must match at least one site; ``layers`` then keeps those layers only.

        Raises
        ------
        SiteError
            Names the target that matches nothing, what would be near it, and what there is.
        """
        if targets == "all-linear":
            chosen = [s for s in self if s.path not in self.uncalled]
        else:
            names = (targets,) if isinstance(targets, str) else tuple(targets)
            if not names:
                raise SiteError(
                    "target_modules is empty: nothing would be adapted", hint="leave it out for the default"
                )
            hits = {name: self._matching(name) for name in names}
            for name, found in hits.items():
                if not found:
                    raise self.nothing_for(name)
            wanted = {s.path for found in hits.values() for s in found}
            chosen = [s for s in self._every.values() if s.path in wanted]
        if layers is not None:
            absent = sorted(set(layers) - {s.layer for s in chosen})
            if absent or not layers:
                raise SiteError(
                    f"no site of {targets!r} lies in layers {absent or 'of an empty list'}",
                    hint=f"layers: {self.depth()}",
                )
            chosen = [s for s in chosen if s.layer in set(layers)]
        return chosen

    def depth(self) -> str:
        """Layer range of each stack, for messages."""
        stacks: dict[str, set[int]] = {}
        for s in self:
            if s.layer is not None:
                stacks.setdefault(s.stack, set()).add(s.layer)
        return ", ".join(f"{k or 'blocks'} 0-{max(v)}" for k, v in stacks.items())

    def _matching(self, name: str) -> list[Site]:
        return [
            s
            for s in self._every.values()
            if name in (s.path, s.name)
            or s.path.endswith("." + name)
            or (name == s.role and s.path not in self.uncalled)
        ]

    def nothing_for(self, name: str) -> SiteError:
        """The error for a target that matches nothing, with what is near it."""
        inside = [s for s in self._every.values() if s.layer is not None]
        known = sorted({s.role for s in inside} | {s.path.rsplit(".", 1)[-1] for s in inside})
        near = [k for k in known if k.endswith("." + name)] or difflib.get_close_matches(name, known, n=2)
        guess = f"; did you mean {' or '.join(near)}?" if near else ""
        return SiteError(
            f"target {name!r} matches no linear layer of this {self.model_type} model{guess}",
            hint="choose from: " + ", ".join(known),
        )
