"""Commands in a moment: one process imports torch and all of ours once, and every command is a fork of it.

`python warm.py SOCKET` serves; a `client` script in PATH sends its words, folder, environment and streams there, and
exits as the command does. The command sees a process like any other; when its client goes, it goes too.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
from pathlib import Path

CLIENT = """#!{python} -SE
import json, os, socket, sys
words = {words!r} + sys.argv[1:]
link = socket.socket(socket.AF_UNIX)
link.connect({place!r})
sent = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(link, [len(sent).to_bytes(8, "big") + sent], [0, 1, 2])
said = link.recv(8)
sys.exit(int(said) if said else 1)
"""


IMPORTED = (
    "bitsandbytes",
    "peft",
    "transformers.models.auto.modeling_auto",
    "compose.api",
    "compose.artifacts.publish",
    "hub.registry.commands",
    "router.engine.engine",
    "router.serving.commands",
    "train.fewshot.run",
    "train.pipeline",
)


def client(path: Path, place: str, words: list[str]) -> None:
    """Write a script that runs ``words`` and its own arguments in the process behind ``place``."""
    path.write_text(CLIENT.format(python=sys.executable, words=words, place=place))
    path.chmod(0o755)


def serve(place: str) -> None:
    """Import everything, then fork for each client."""
    for name in IMPORTED:
        importlib.import_module(name)
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(place)
    listening.listen()
    while True:
        link, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _command(link)
        link.close()


def _command(link: socket.socket) -> None:
    data, streams, _, _ = socket.recv_fds(link, 2**16, 3)
    size = int.from_bytes(data[:8], "big") + 8
    while len(data) < size:
        data += link.recv(2**16)
    words, folder, environment = json.loads(data[8:])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_watch, args=(link,), daemon=True).start()
    code = _run(words)
    sys.stdout.flush()
    sys.stderr.flush()
    link.send(str(code).encode())
    os._exit(code)


def _watch(link: socket.socket) -> None:
    """End this process once its client has."""
    if not link.recv(1):
        os.kill(os.getpid(), signal.SIGKILL)


def _run(words: list[str]) -> int:
    sys.argv = words
    try:
        if words[0] == "hub":
            from hub.cli import main

            main(prog_name="hub")
        else:
            sys.argv = words[1:]
            sys.path.insert(0, str(Path(words[1]).parent))
            runpy.run_path(words[1], run_name="__main__")
    except SystemExit as done:
        if isinstance(done.code, str):
            sys.stderr.write(done.code + "\n")
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    serve(sys.argv[1])
