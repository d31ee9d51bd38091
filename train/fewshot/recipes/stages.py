"""Stages of a long recipe as nodes of a graph: each result is kept under the hash of everything it depends on.

A stage's key is the hash of its name, its facts and the keys of the stages it needs. With a folder, a result that is
there is read and not made again, so an interrupted recipe goes on where it was, and a changed fact remakes what
depends on it and nothing else. Results are freed after their last use.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import networkx as nx
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hub.io.files import atomic_write
from train.errors import TrainError

__all__ = ["Pipeline", "Stage", "Tensors"]

Tensors: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Stage:
    """A step: what it is called, what decides its result, what it needs, and how it is done.

    `run` gets the results of `needs` by name and returns tensors.
    """

    name: str
    facts: Mapping[str, Any]
    needs: tuple[str, ...]
    run: Callable[[Mapping[str, Tensors]], Tensors]


class Pipeline:
    """A graph of stages.

    Parameters
    ----------
    folder
        Where results are kept; None keeps nothing.
    say
        Told a line before each stage that runs.
    """

    def __init__(self, folder: Path | None = None, say: Callable[[str], None] = lambda _text: None) -> None:
        self.folder, self.say = folder, say
        self.graph: nx.DiGraph[str] = nx.DiGraph()
        self.stages: dict[str, Stage] = {}

    def add(self, stage: Stage) -> str:
        """Add a stage after those it needs; returns its name.

        Raises
        ------
        TrainError
            Its name is taken, or it needs a stage that is not there.
        """
        missing = [name for name in stage.needs if name not in self.stages]
        if stage.name in self.stages or missing:
            what = f"needs {', '.join(missing)}, which is not there" if missing else "is there already"
            raise TrainError(f"stage {stage.name!r} {what}")
        self.stages[stage.name] = stage
        self.graph.add_node(stage.name)
        self.graph.add_edges_from((need, stage.name) for need in stage.needs)
        return stage.name

    def key(self, name: str) -> str:
        """Hash of all that the result of a stage depends on."""
        stage = self.stages[name]
        facts = {"name": name, "facts": dict(stage.facts), "needs": [self.key(need) for need in stage.needs]}
        text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def run(self, *wanted: str) -> dict[str, Tensors]:
        """Results of the wanted stages (default: of those nothing needs); only what these need is done."""
        goals = list(wanted) or [name for name in self.graph if self.graph.out_degree(name) == 0]
        results: dict[str, Tensors] = {}
        needed = self._to_make(goals, results)
        order = [name for name in nx.topological_sort(self.graph) if name in needed]
        for number, name in enumerate(order, 1):
            self.say(f"[{number}/{len(order)}] {name}")
            stage = self.stages[name]
            results[name] = stage.run({need: results[need] for need in stage.needs})
            self._keep(name, results[name])
            for need in stage.needs:  # free what no stage to come reads
                later = set(self.graph.successors(need)) & set(order[number:])
                if not later and need not in goals:
                    results.pop(need, None)
        return {name: results[name] for name in goals}

    def _to_make(self, goals: list[str], results: dict[str, Tensors]) -> set[str]:
        """Stages whose results are not kept; what is kept and read goes into `results`."""
        needed: set[str] = set()
        waiting = list(goals)
        while waiting:
            name = waiting.pop()
            if name in results or name in needed:
                continue
            kept = self._read(name)
            if kept is not None:
                results[name] = kept
            else:
                needed.add(name)
                waiting += self.stages[name].needs
        return needed

    def _path(self, name: str) -> Path | None:
        return self.folder / f"{self.key(name)[:32]}.safetensors" if self.folder else None

    def _read(self, name: str) -> Tensors | None:
        path = self._path(name)
        if path is None or not path.is_file():
            return None
        try:
            kept: Tensors = load(path.read_bytes())
        except SafetensorError:  # torn by a crash of the disk: made again
            return None
        return kept

    def _keep(self, name: str, tensors: Tensors) -> None:
        path = self._path(name)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, save({key: value.contiguous() for key, value in tensors.items()}))
