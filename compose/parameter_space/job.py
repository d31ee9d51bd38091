"""One merge to be carried out: its members, the method, the options, and the model around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from compose.base.sites import SiteMap
from compose.errors import KindError
from compose.expr.tree import Expr, Ref, Seq
from compose.kind.adapter import Adapter
from compose.parameter_space.method import Method
from compose.slots.lowering import LoweringContext, flatten
from hub.console.progress import Steps

Statistics: TypeAlias = Callable[[str], Sequence[Tensor]]  # path -> what was measured there of each member
_T = TypeVar("_T")


class AdaptedModel(LoweringContext, Protocol):
    """A model with resident adapters."""

    model: PreTrainedModel
    sites: SiteMap

    def adapter(self, name: str) -> Adapter:
        """The adapter called ``name``; NotFound otherwise."""


@dataclass(frozen=True)
class Member:
    """One argument of a merge: a call-free expression over resident adapters."""

    expr: Expr
    adapters: tuple[Adapter, ...]
    terms: tuple[tuple[float, Adapter], ...]

    @classmethod
    def of(cls, expr: Expr, home: AdaptedModel) -> Member:
        """Look up the leaves; NotFound names the one that is missing."""
        adapters = {name: home.adapter(name) for name in expr.refs}
        terms = tuple((float(c), adapters[name]) for c, name in flatten(expr, {}))
        return cls(expr, tuple(adapters.values()), terms)

    @property
    def single(self) -> bool:
        """Whether it is one adapter as it is."""
        return isinstance(self.expr, Ref)

    @property
    def sequential(self) -> bool:
        """Whether it holds a sequence, whose stages are no terms of a sum."""
        return any(isinstance(node, Seq) for node in self.expr.walk())


@dataclass(frozen=True)
class Job:
    """A merge: ``text`` for messages, ``name`` for the result, ``statistics`` for a method that needs some."""

    home: AdaptedModel
    members: tuple[Member, ...]
    method: Method
    options: Any
    name: str
    text: str
    progress: Steps | None = None
    statistics: Statistics | None = None

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """All adapters of all members, each once."""
        return tuple({id(a): a for m in self.members for a in m.adapters}.values())

    @property
    def paths(self) -> list[str]:
        """Where any member acts on a module, each once."""
        return list(dict.fromkeys(path for adapter in self.adapters for path in adapter.module_paths))

    @property
    def rank(self) -> int | None:
        """Rank asked for in the options."""
        return getattr(self.options, "rank", None)

    @property
    def kinds(self) -> str:
        """Kinds of the members, for messages."""
        return ", ".join(dict.fromkeys(f"{a.kind} {a.name!r}" for a in self.adapters))

    def steps(self, items: Sequence[_T], what: str) -> Iterator[_T]:
        """Iterate and report progress."""
        for i, item in enumerate(items):
            yield item
            if self.progress is not None:
                self.progress(what, i + 1, len(items))

    def refuse(self, reason: str, hint: str | None = None) -> KindError:
        """The error that names this merge."""
        return KindError(f"{self.text}: {reason}", hint=hint)


def kind_names(adapters: Iterable[Adapter]) -> set[str]:
    """Names of the kinds of ``adapters``."""
    return {a.kind for a in adapters}
