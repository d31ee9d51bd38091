"""Pages, and a warm process with a store in which all that they name exists."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

import warm

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Desk:
    """Runs Python files and `hub` in copies of a prepared folder, as a user at a shell would."""

    def __init__(self, room: Path) -> None:
        self.room, self.count = room, 0
        socket, clients = str(room / "socket"), room / "bin"
        clients.mkdir()
        self.environment = {
            **{name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")},
            "PATH": f"{clients}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "CURL_HOME": str(room),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(room / "hf"),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        (room / ".curlrc").write_text("fail-with-body\nsilent\n")
        warm.client(clients / "hub", socket, ["hub"])
        warm.client(clients / "warm-python", socket, ["python"])
        command = [sys.executable, str(HERE / "warm.py"), socket]
        self.process = subprocess.Popen(command, env=self.environment, cwd=room)

    def __enter__(self) -> Desk:
        try:
            while not (self.room / "socket").exists():
                assert self.process.poll() is None, "the warm process ended"
                time.sleep(0.1)
            self.run(HERE / "prepare.py", self.room / "prepared", cwd=self.room)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def folder(self) -> Path:
        """A fresh copy: `home` and `work`."""
        self.count += 1
        place = self.room / str(self.count)
        shutil.copytree(self.room / "prepared", place)
        (place / "home" / "remotes.json").write_text(f'{{"team": "{place / "team"}"}}')
        return place

    def run(self, *words: object, cwd: Path) -> str:
        """Run a Python file in ``cwd``, with the home beside it; what it said. It must not fail."""
        environment = {**self.environment, "HUB_HOME": str(cwd.parent / "home")}
        program = str(self.room / "bin" / "warm-python")
        done = subprocess.run(
            [program, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="session")
def desk(tmp_path_factory):
    with Desk(tmp_path_factory.mktemp("desk")) as made:
        yield made
