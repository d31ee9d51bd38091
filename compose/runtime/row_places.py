"""What tells rows of a batch apart in the active composition, and whether it can: else it is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compose.base.sites import FINAL, SiteMap
from compose.errors import KindError
from compose.runtime.composition import Composition
from compose.runtime.row_trials import RowTrials
from compose.runtime.trial_findings import OTHER
from compose.slots.row_layout import ROWS_FIRST, RowLayout
from compose.slots.slot import Slot


class RowPlaces:
    """Where the rows stand wherever the active composition has to know, by the trial calls of one model."""

    def __init__(
        self, model: PreTrainedModel, sites: SiteMap, at_rest: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self._sites = sites
        self._trials = RowTrials(model, sites, at_rest)
        self._slots: Mapping[str, Slot] = {}
        self._plain: dict[str, str] = {}
        self._prompted = ""
        self._open = False

    def before(
        self, composition: Composition, slot: Callable[[str], Slot], check: Callable[[Composition], None]
    ) -> None:
        """Find the rows at the slots that tell them apart, and wherever else their order is read; then ``check``.

        Raises
        ------
        KindError
            Rows are not to be told apart there; what was active is.
        """
        before = self._slots, self._plain, self._prompted, self._open
        self._prompted = "" if composition.prompt is None else self._sites.embedding
        self._slots = {path: slot(path) for path in self._apart(composition)}
        self._plain = {FINAL: "a side network"} if FINAL in composition.programs else {}
        if composition.count > 1 and composition.prefixes:
            moved = self._sites.positions if composition.shift is not None else ()
            self._plain |= dict.fromkeys((*composition.prefixes, *moved), "a prefix of each row's own")
        self._open = bool(self._slots or self._plain)
        if self._open:
            try:
                self._trials.before_activation(self._wanted)
                self._settle()
                check(composition)
            except BaseException:
                self._slots, self._plain, self._prompted, self._open = before
                raise

    def _apart(self, composition: Composition) -> list[str]:
        programs = {path: p for path, p in composition.programs.items() if p.per_row and path != FINAL}
        taps = [tap for program in programs.values() for tap in program.taps]
        return list(dict.fromkeys((*programs, *taps, *([self._prompted] if self._prompted else []))))

    def before_call(self, module: nn.Module, given: Mapping[str, Any]) -> None:
        """Find what is open still, with the arguments of the call that is about to run.

        Raises
        ------
        KindError
            Rows are not to be told apart there.
        """
        if self._open and not torch.compiler.is_compiling():
            self._trials.before_call(module, given, self._wanted)
            self._settle()
            if self._sites.text and self._trials.reads_more(module, given):
                beside = [path for path in self._slots if not self._sites.reads_text(path)]
                lost = [path for path in beside if path not in self._trials.found]
                if lost:
                    raise self._refusal(dict.fromkeys(lost, OTHER))

    @property
    def _wanted(self) -> tuple[str, ...]:
        return *self._slots, *self._plain

    def _settle(self) -> None:
        """Give the slots their layouts, and refuse the composition where there is none."""
        found = self._trials.found
        refused = {path: why for path in self._slots if isinstance(why := found.get(path), str)}
        if refused:
            raise self._refusal(refused)
        text = found.get(self._prompted)
        if isinstance(text, RowLayout) and not text.tokens:
            raise KindError(
                f"a prompt cannot stand before the texts of this {self._sites.model_type} model: it pads them"
            )
        for path, what in self._plain.items():
            layout = found.get(path, ROWS_FIRST)
            if isinstance(layout, str) or not layout.is_plain:
                why = layout if isinstance(layout, str) else "does not get one entry a row, in the first dimension"
                where = "the last block" if path == FINAL else path
                raise KindError(f"{what} cannot act in this {self._sites.model_type} model: {where} {why}")
        for path, slot in self._slots.items():
            place = found.get(path)
            slot.layout = place if isinstance(place, RowLayout) else None
        self._open = not self._trials.knows(self._wanted)

    def _refusal(self, refused: Mapping[str, str]) -> KindError:
        path, why = next(iter(refused.items()))
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        every = self._sites.paths
        bad = {self._sites[p].role for p in refused if p in every}
        good = sorted({self._sites[p].role for p in self._slots if p in every} - bad)
        if any(map(self._sites.reads_text, self._slots)) and not any(map(self._sites.reads_text, refused)):
            good = [self._sites.text.rpartition(".")[2]]  # all that reads the text
        apart = f", or keep adapters to where they can: at(a, sites=[{', '.join(map(repr, good))}])" if good else ""
        return KindError(
            f"rows of a batch cannot have adapters of their own at {path}{more}, which {why}",
            hint=f"activate one composition for the whole batch{apart}",
        )
