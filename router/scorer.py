"""The contract of a scorer: how well each expert fits a row, or a token at a site.

A scorer is one file under ``router/scorers/`` (or any package's ``hub.scorers`` entry point)::

    @register("centroid")
    class Centroid(RowScorer):
        Options = CentroidOptions
        ...

Fitting, storing, adding and removing members, the commands and the contract tests follow from the registration. What a
scorer knows of an expert is that expert's `Statistics`, tensors that stand for themselves: a member is added by
measuring it alone and removed by dropping its entry, unless the scorer learns its experts against each other (`joint`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from hub.errors import UsageError, suggest
from hub.plugins import Registry
from router.bench import Batch, Bench, Experts
from router.gating import Gating

Statistics: TypeAlias = Mapping[str, Tensor]
SHARED = "*"  # in place of an expert: statistics that are nobody's own
SiteScores: TypeAlias = Callable[[str, Tensor], Tensor | None]
Recorder: TypeAlias = Callable[[str, Tensor], None]


class ScorerOptions(BaseModel):
    """Options of a scorer; unknown ones are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Scorer(ABC):
    """Scores experts. Subclass `RowScorer` or `SiteScorer`."""

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    Options: ClassVar[type[ScorerOptions]] = ScorerOptions
    gating: ClassVar[Gating] = Gating()  # the paper's own, where a router says nothing else
    level: ClassVar[str]  # "row" or "site"
    joint: ClassVar[bool] = False  # the experts are learned against each other: one more means fitting all again
    needs_data: ClassVar[bool] = True  # of each expert
    reads_tasks: ClassVar[bool] = False  # rows have to say which expert they ask for
    continues: ClassVar[bool] = False  # it reads or learns how experts continue texts: none of them may classify

    def __init__(self, options: ScorerOptions | None = None) -> None:
        self.options: Any = options or self.Options()

    def fit(self, bench: Bench) -> dict[str, Statistics]:
        """Statistics of each expert.

        Raises
        ------
        UsageError
            An expert without data where the scorer needs some.
        """
        if self.needs_data:
            bench.need_data()
        return {expert: self.measure(expert, bench) for expert in bench.experts}

    def measure(self, expert: str, bench: Bench) -> Statistics:
        """Statistics of one expert, whatever the others are."""
        return {}

    def check(self, gating: Gating, experts: int) -> None:
        """Raise UsageError where a gating does not go with so many experts, or with the options."""
        gating.check(experts)

    def wanted(self, expert: str) -> tuple[str, ...]:
        """Names that the statistics of an expert (or of `SHARED`) must have: files from outside are held to it."""
        return ()

    @property
    def shown_options(self) -> dict[str, Any]:
        """Options that differ from their defaults, JSON-ready."""
        return dict(self.options.model_dump(mode="json", exclude_defaults=True))


class RowScorer(Scorer):
    """Scores experts for each row of a batch: all tokens of a row get the same experts."""

    level = "row"

    @abstractmethod
    def score(
        self, model: PreTrainedModel, batch: Batch, experts: Experts, statistics: Mapping[str, Statistics]
    ) -> Tensor:
        """Scores (B, E) in the order of the experts; -inf rules one out."""


class SiteScorer(Scorer):
    """Scores experts for each token at each site, from what enters the site."""

    level = "site"
    continues = True  # a head is no site

    @abstractmethod
    def scores(self, statistics: Mapping[str, Statistics]) -> SiteScores:
        """Function of a site's path and input x (B, T, d) that gives scores (B, T or 1, E), or None: no expert."""

    def mixer(self, statistics: Mapping[str, Statistics], record: Recorder | None = None) -> Any | None:
        """A `compose.slots.gate.Mixer`, where experts are mixed by what they answer; the gating is then not asked.

        `record` is told the weights (B, T, E) at each site.
        """
        return None


# -- the registry ------------------------------------------------------------------------------------------------

SCORERS = Registry[type[Scorer]]("routing method", package="router.scorers", group="hub.scorers")
_S = TypeVar("_S", bound=type[Scorer])


def register(name: str) -> Callable[[_S], _S]:
    """Class decorator that makes a scorer known under ``name``."""

    def add(cls: _S) -> _S:
        SCORERS.add(name, cls)
        cls.name = name
        return cls

    return add


def make_scorer(name: str, options: Mapping[str, Any] | None = None) -> Scorer:
    """The scorer called ``name`` with these options.

    Raises
    ------
    UsageError
        An unknown scorer or option (with a suggestion), or a value that does not fit.
    """
    cls, given = SCORERS.get(name), dict(options or {})
    fields = cls.Options.model_fields
    for key in given:
        if key not in fields:
            hint = suggest(key, fields) or "options: " + (", ".join(fields) or "none")
            raise UsageError(f"routing method {name!r} has no option {key!r}", hint=hint)
    try:
        return cls(cls.Options.model_validate(given))
    except ValidationError as error:
        first = error.errors()[0]
        told, where = first["msg"].removeprefix("Value error, "), ".".join(str(part) for part in first["loc"])
        place = f", option {where}: {told} (got {first['input']!r})" if where else f": {told}"
        raise UsageError(f"routing method {name!r}{place}", hint="`hub route methods` tells the options") from None
