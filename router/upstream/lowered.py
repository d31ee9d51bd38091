"""Plain LoRAs on disk, one directory for each digest: written once, whoever asks, in a process of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from filelock import FileLock

import compose.errors
import hub.errors
from compose.errors import KindError
from hub.errors import HubError, StoreError
from hub.io.canonical_json import dumps
from hub.store import default_root
from router.upstream.names import Meaning, Names

_FACTS = "moduloom.json"
_REFUSALS = 1024  # kept, so that what was refused is not tried again at each request


@dataclass(frozen=True)
class Lowered:
    """A LoRA that an engine can read: what it stands for, where it lies, its rank and what it leaves out."""

    meaning: Meaning
    directory: Path
    rank: int
    discarded: float
    certificate: str


class Lowering:
    """The LoRAs for one served base, under ``cache/engines`` of HUB_HOME; from any thread and any process."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self.root = default_root() / "cache" / "engines"
        self._refused: OrderedDict[str, HubError] = OrderedDict()
        self._one = Lock()  # each writing loads a base: one at a time in this process

    def get(self, text: str) -> Lowered:
        """The LoRA that a name stands for now.

        Raises
        ------
        HubError
            As for :meth:`router.upstream.names.Names.find`; KindError for what no LoRA does.
        """
        meaning = self.names.find(text)
        if meaning.digest in self._refused:
            raise self._refused[meaning.digest]
        place = self.root / meaning.digest
        if not place.is_dir():
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / f"{meaning.digest}.lock"):
                if not place.is_dir():
                    self._write(meaning, place)
        facts = json.loads((place / _FACTS).read_text("utf-8"))
        return Lowered(meaning, place, facts["rank"], facts["discarded"], facts["certificate"])

    def _write(self, meaning: Meaning, place: Path) -> None:
        """Fill the directory of a digest: whole, or not at all."""
        job = {
            "expression": meaning.text,
            "shown": meaning.shown,
            "base": str(self.names.directory),
            "rank": self.names.rank,
            "max_discarded": self.names.max_discarded,
            "lora": meaning.lora,
        }
        room = Path(tempfile.mkdtemp(dir=self.root, prefix=f".{meaning.digest[:12]}."))
        try:
            young = room / "young"
            young.mkdir()
            with self._one:
                done = _run({**job, "out": str(young)})
            if "error" in done:
                raise self._refuse(meaning, done)
            (young / _FACTS).write_bytes(dumps({**job, **done}))
            young.replace(place)
        finally:
            shutil.rmtree(room, ignore_errors=True)

    def _refuse(self, meaning: Meaning, done: dict[str, Any]) -> HubError:
        known = {**vars(hub.errors), **vars(compose.errors)}
        kind: type[HubError] = known.get(done["error"], KindError)
        error = kind(done["message"], hint=done.get("hint"))
        if not isinstance(error, StoreError):  # a full disk may be empty later
            self._refused[meaning.digest] = error
            if len(self._refused) > _REFUSALS:
                self._refused.popitem(last=False)
        return error


def _run(job: dict[str, Any]) -> dict[str, Any]:
    """Carry a job out in a process of its own, on the CPU and without an engine's plugins."""
    around = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    done = subprocess.run(
        [sys.executable, "-m", "router.upstream.lower"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
        env={**around, "CUDA_VISIBLE_DEVICES": ""},
    )
    if done.returncode or not done.stdout.strip():
        last = (done.stderr.strip() or "nothing was said").splitlines()[-1]
        raise RuntimeError(f"writing {job['shown']} as a LoRA ended with {done.returncode}: {last}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer
