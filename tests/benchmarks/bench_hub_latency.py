"""Pull and push of an adapter of many files from a registry that is far away, one file at a time and several.

    python tests/benchmarks/bench_hub_latency.py [--files 24] [--kilobytes 256] [--latency 0.05] [--rounds 3]
        [--jobs 8] [--json FILE|-]

The server is `hub registry` on loopback, in a process of its own, with a delay before each answer. The peer is
`huggingface_hub.snapshot_download` with as many workers from the same server, which checks no bytes. Every transfer
starts with an empty store and an empty cache. Medians of the rounds; the order of the candidates turns.
"""

import argparse
import asyncio
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
from safetensors.numpy import save_file

from hub.manifest import Draft
from hub.pack import pack
from hub.store import Store
from hub.transfer import pull, push


def serve(root: Path, latency: float) -> None:
    """Serve a store, each answer late; the URL is the first line of stdout."""
    import uvicorn

    from hub.registry.app import create_app

    app = create_app(Store(root))

    async def late(scope, receive, send) -> None:
        if scope["type"] == "http":
            await asyncio.sleep(latency)
        await app(scope, receive, send)

    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        uvicorn.Server(uvicorn.Config(late, log_level="error")).run(sockets=[listener])


@contextmanager
def registry(root: Path, latency: float):
    command = [sys.executable, __file__, "--serve", str(root), "--latency", str(latency)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        url = server.stdout.readline().strip()
        for _ in range(400):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) == 0:
                    break
            time.sleep(0.05)
        try:
            yield url
        finally:
            server.terminate()


def artifact(place: Path, files: int, kilobytes: int) -> Store:
    directory, random = place / "artifact", np.random.default_rng(0)
    (directory / "aux").mkdir(parents=True)
    for i in range(files):
        path = directory / ("adapter_model.safetensors", f"aux/part-{i:03d}.safetensors")[i > 0]
        save_file({"a": random.random((kilobytes, 256), np.float32)}, path, metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text("{}")
    pack(directory, Draft(name="acme/far", version="1.0", kind="lora"))
    store = Store(place / "source")
    store.put(directory)
    return store


def seconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def once(place: Path, source: Store, url: str, options: argparse.Namespace, turn: int) -> dict[str, float]:
    from huggingface_hub import constants, snapshot_download

    from hub.remotes import from_url

    remote, jobs = f"hf+{url}", options.jobs
    constants.HF_HUB_CACHE = str(place / "cache")

    def fetch(count: int) -> Store:
        store = Store(place / "store")
        pull(store, from_url(remote), "acme/far", jobs=count)
        return store

    candidates = {
        "pull, one at a time": lambda: fetch(1),
        f"pull, {jobs} at once": lambda: fetch(jobs),
        "snapshot_download": lambda: snapshot_download(
            "acme/far", revision="1.0", endpoint=url, cache_dir=place / "cache", max_workers=jobs
        ),
    }
    found = {}
    names = list(candidates)
    for name in names[turn % len(names) :] + names[: turn % len(names)]:
        found[name] = seconds(candidates[name])
        shutil.rmtree(place, ignore_errors=True)
    for count in (1, jobs):  # to a bare server each, as what is there is not sent again
        name = "push, one at a time" if count == 1 else f"push, {jobs} at once"
        with registry(place / f"bare-{count}", options.latency) as bare:
            found[name] = seconds(
                lambda bare=bare, count=count: push(source, from_url(f"hf+{bare}"), "acme/far", jobs=count)
            )
    shutil.rmtree(place, ignore_errors=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--files", type=int, default=24)
    parser.add_argument("--kilobytes", type=int, default=256)
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve, options.latency)
        return
    report = measure(options)
    for name, value in report.items():
        print(f"{name:<32} {value if isinstance(value, str) else round(value, 3)}", file=sys.stderr)
    if options.json is not None:
        text = json.dumps(report, indent=2)
        print(text) if str(options.json) == "-" else options.json.write_text(text)


def measure(options: argparse.Namespace) -> dict[str, object]:
    os.environ["HF_HUB_OFFLINE"] = "0"  # the server is on this machine
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    with tempfile.TemporaryDirectory() as directory:
        source = artifact(Path(directory), options.files, options.kilobytes)
        with registry(source.root, options.latency) as url:
            rounds = [
                once(Path(directory) / f"round-{turn}", source, url, options, turn) for turn in range(options.rounds)
            ]
    found = {name: median(each[name] for each in rounds) for name in rounds[0]}
    many = f"{options.jobs} at once"
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "files": options.files + 1,
        "kilobytes each": options.kilobytes,
        "latency, s": options.latency,
        **found,
        "pull: speed-up": median(each["pull, one at a time"] / each[f"pull, {many}"] for each in rounds),
        "push: speed-up": median(each["push, one at a time"] / each[f"push, {many}"] for each in rounds),
        "pull / snapshot_download": median(each[f"pull, {many}"] / each["snapshot_download"] for each in rounds),
    }


if __name__ == "__main__":
    main()
