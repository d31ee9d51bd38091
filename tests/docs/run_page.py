"""Run a page as printed, in the folder where it is called: `run_page.py PAGE`.

Shell blocks by bash, Python blocks in one namespace, in the page's order; a block that begins with a file's name is
written there. `hub serve` and `hub registry` go on beside what follows, at a port that is free.
"""

from __future__ import annotations

import linecache
import os
import re
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

from pages import SHELL, Block, blocks

SERVERS = re.compile(r"hub (serve|registry)\b(?! token)")
DEFAULTS = {"serve": "8001", "registry": "8000"}


class Page:
    """One page under way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: dict[str, object] = {"__name__": "__main__"}
        self.ports: dict[str, str] = {}
        self.servers: list[subprocess.Popen[bytes]] = []

    def run(self) -> None:
        """All blocks; SystemExit with the place of the first that fails."""
        try:
            for block in blocks(self.path.read_text(encoding="utf-8")):
                place, started = f"{self.path.name}:{block.line}", time.perf_counter()
                if block.needs is None:
                    self.block(block, place)
                print(f"{place} {block.language} {time.perf_counter() - started:.1f} s", flush=True)
        finally:
            for server in self.servers:
                server.kill()
                server.wait()

    def block(self, block: Block, place: str) -> None:
        """One block."""
        if block.file is not None:
            path = Path(block.file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            self.python(self.moved(block.text), place)
        elif block.language in SHELL:
            self.shell(self.moved(block.text), place)
        elif block.language != "text":
            raise SystemExit(f"{place}: nobody knows how to run {block.language!r}; what is only shown is ```text")

    def python(self, text: str, place: str) -> None:
        """Python, in the page's namespace."""
        linecache.cache[place] = (len(text), None, text.splitlines(keepends=True), place)
        try:
            exec(compile(text, place, "exec"), self.names)
        except Exception:
            traceback.print_exc()
            raise SystemExit(f"{place}: the Python block failed") from None

    def shell(self, text: str, place: str) -> None:
        """Bash; a line that serves is left running."""
        lines: list[str] = []
        for line in text.replace("\\\n", " ").splitlines():
            if SERVERS.match(line):
                self.bash(lines, place)
                lines = []
                self.serve(line)
            else:
                lines.append(line)
        self.bash(lines, place)

    def bash(self, lines: list[str], place: str) -> None:
        """Lines that must all succeed."""
        if not any(lines):
            return
        environment = dict(os.environ)
        if any("HF_ENDPOINT=" in line for line in lines):
            del environment["HF_HUB_OFFLINE"]
        done = subprocess.run(["bash", "-eo", "pipefail", "-c", "\n".join(lines)], env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"{place}: exit {done.returncode} of\n" + "\n".join(lines))

    def serve(self, line: str) -> None:
        """Start a server and wait for it."""
        verb = SERVERS.match(line)[1]
        command = line.split(" #", maxsplit=1)[0]
        if "--port" not in command:
            command += f" --port {self.port(DEFAULTS[verb])}"
        number = re.search(r"--port (\d+)", command)[1]
        self.servers.append(subprocess.Popen(["bash", "-c", f"exec {command}"]))
        for _ in range(600):
            with socket.socket() as link:
                if link.connect_ex(("127.0.0.1", int(number))) == 0:
                    return
            time.sleep(0.1)
        raise SystemExit(f"nothing answers: {command}")

    def port(self, printed: str) -> str:
        """A free port that stands for a printed one."""
        if printed not in self.ports:
            with socket.socket() as link:
                link.bind(("127.0.0.1", 0))
                self.ports[printed] = str(link.getsockname()[1])
        return self.ports[printed]

    def moved(self, text: str) -> str:
        """The text with free ports in place of those printed."""
        return re.sub(r"(?<=--port )\d+|(?<=localhost:)\d+|(?<=127\.0\.0\.1:)\d+", lambda m: self.port(m[0]), text)


if __name__ == "__main__":
    Page(Path(sys.argv[1])).run()
