"""A registry under load: concurrent clients that push and pull over loopback, and every byte they get is checked.

    python tests/benchmarks/bench_registry.py [--clients 64] [--seconds 60] [--kilobytes 256] [--writes 0.2]
        [--json -]

A pull is what a stock client does: the revision's info, its tree, HEAD and GET of each file; a push is preupload,
one commit and a version tag, which runs the gates. Prints the median and the 99th percentile of each, failures, and
the server's memory over time. Then one large download side by side with Python's own http.server on the same file.
"""

import argparse
import base64
import hashlib
import json
import multiprocessing
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from statistics import median

import numpy as np
import psutil
from safetensors.numpy import save

PROCESSES = 4  # client processes; each runs its share of the clients as threads
SERVER = "from hub.registry.commands import registry; registry()"
CONFIG = b'{"lora_alpha": 8, "peft_type": "LORA", "r": 8}'


class Client:
    """One client with one connection."""

    def __init__(self, host: str, seed: int, kilobytes: int) -> None:
        self.connection = HTTPConnection(host, timeout=60)
        self.random = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.kilobytes = kilobytes
        self.requests = 0

    def ask(self, method: str, path: str, body: object = None) -> tuple[dict[str, str], bytes]:
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        self.connection.request(method, path, body=data)
        answer = self.connection.getresponse()
        found = answer.read()
        self.requests += 1
        if answer.status >= 300:
            raise HTTPException(f"{answer.status} {method} {path}: {found[:200]!r}")
        return {name.lower(): value for name, value in answer.getheaders()}, found

    def make(self) -> dict[str, bytes]:
        """Files of a new adapter."""
        tensor = self.numbers.normal(size=(8, self.kilobytes * 32)).astype(np.float32)
        weights = save({"base_model.model.x.lora_A.weight": tensor}, metadata={"format": "pt"})
        return {"adapter_config.json": CONFIG, "adapter_model.safetensors": weights}

    def push(self, name: str, files: dict[str, bytes]) -> None:
        asked = {"files": [{"path": path, "size": len(data), "sample": ""} for path, data in files.items()]}
        self.ask("POST", f"/api/models/{name}/preupload/main", asked)
        lines = [{"key": "header", "value": {"summary": "load"}}]
        for path, data in files.items():
            lines.append({"key": "file", "value": {"content": base64.b64encode(data).decode(), "path": path}})
        body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        oid = json.loads(self.ask("POST", f"/api/models/{name}/commit/main", body)[1])["commitOid"]
        version = f"1.{self.random.randrange(10**9)}.{self.random.randrange(10**9)}"
        self.ask("POST", f"/api/models/{name}/tag/{oid}", {"tag": version})

    def pull(self, name: str, _files: dict[str, bytes]) -> None:
        tags = json.loads(self.ask("GET", f"/api/models/{name}/refs")[1])["tags"]
        version = self.random.choice(tags)["name"]
        oid = json.loads(self.ask("GET", f"/api/models/{name}/revision/{version}")[1])["sha"]
        for entry in json.loads(self.ask("GET", f"/api/models/{name}/tree/{oid}?recursive=true")[1]):
            path = f"/{name}/resolve/{oid}/{entry['path']}"
            headers, _ = self.ask("HEAD", path)
            _, data = self.ask("GET", path)
            if "lfs" in entry:
                right = hashlib.sha256(data).hexdigest() == entry["lfs"]["oid"]
            else:
                right = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == entry["oid"]
            if not right or headers["x-repo-commit"] != oid:
                raise ValueError(f"wrong bytes of {name} {version} {entry['path']}")


def run_client(host: str, seed: int, options: argparse.Namespace, until: float, found: list) -> None:
    client = Client(host, seed, options.kilobytes)
    while time.monotonic() < until:
        name = f"bench/a{client.random.randrange(16)}"
        verb = "push" if client.random.random() < options.writes else "pull"
        files = client.make() if verb == "push" else {}
        start, before = time.perf_counter(), client.requests
        try:
            getattr(client, verb)(name, files)
            failure = None
        except (OSError, HTTPException, ValueError) as error:
            failure = f"{type(error).__name__}: {error}"
            client.connection.close()
        found.append((verb, time.perf_counter() - start, client.requests - before, failure))


def run_clients(host: str, index: int, options: argparse.Namespace, until: float, queue: multiprocessing.Queue) -> None:
    found: list = []
    seeds = range(index, options.clients, PROCESSES)
    threads = [threading.Thread(target=run_client, args=(host, seed, options, until, found)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue.put(found)


def load(host: str, server: psutil.Process, options: argparse.Namespace) -> dict:
    first = Client(host, 10**6, options.kilobytes)
    for index in range(16):
        first.ask("POST", "/api/repos/create", {"name": f"a{index}", "organization": "bench"})
        first.push(f"bench/a{index}", first.make())
    first.connection.close()
    queue: multiprocessing.Queue = multiprocessing.Queue()
    until = time.monotonic() + options.seconds
    jobs = [
        multiprocessing.Process(target=run_clients, args=(host, index, options, until, queue))
        for index in range(PROCESSES)
    ]
    for job in jobs:
        job.start()
    memory = []
    while time.monotonic() < until:
        memory.append(round(server.memory_info().rss / 2**20, 1))
        time.sleep(max(options.seconds / 12, 0.5))
    results = [row for _ in jobs for row in queue.get(timeout=120)]
    for job in jobs:
        job.join()
    failures = [row[3] for row in results if row[3]]
    found: dict = {"requests_per_second": round(sum(row[2] for row in results) / options.seconds, 1)}
    for verb in ("pull", "push"):
        times = sorted(row[1] for row in results if row[0] == verb and not row[3])
        if times:
            p99 = times[min(int(len(times) * 0.99), len(times) - 1)]
            found[verb] = {"count": len(times), "p50_ms": round(median(times) * 1e3), "p99_ms": round(p99 * 1e3)}
    return {**found, "failures": len(failures), "first_failures": failures[:3], "memory_mib": memory}


def download(url: str, rounds: int = 5) -> float:
    """Median seconds of one whole GET."""
    host, _, path = url.removeprefix("http://").partition("/")
    times = []
    for _ in range(rounds):
        connection = HTTPConnection(host)
        start = time.perf_counter()
        connection.request("GET", f"/{path}")
        answer = connection.getresponse()
        while answer.read(2**20):
            pass
        times.append(time.perf_counter() - start)
        connection.close()
    return median(times)


def large(host: str, place: Path, megabytes: int) -> dict:
    client = Client(host, 7, megabytes * 1024)
    client.ask("POST", "/api/repos/create", {"name": "large", "organization": "bench"})
    files = client.make()
    start = time.perf_counter()
    client.push("bench/large", files)
    pushed = time.perf_counter() - start
    version = json.loads(client.ask("GET", "/api/models/bench/large/refs")[1])["tags"][0]["name"]
    path = f"/bench/large/resolve/{version}/adapter_model.safetensors"
    (place / "file").write_bytes(client.ask("GET", path)[1])
    script = (
        "import functools, http.server as s, sys; "
        "h = functools.partial(s.SimpleHTTPRequestHandler, directory=sys.argv[1]); "
        "s.ThreadingHTTPServer(('127.0.0.1', int(sys.argv[2])), h).serve_forever()"
    )
    port = int(host.rpartition(":")[2]) + 1
    peer = subprocess.Popen([sys.executable, "-c", script, str(place), str(port)], stderr=subprocess.DEVNULL)
    try:
        time.sleep(1)
        ours, theirs = download(f"http://{host}{path}"), download(f"http://127.0.0.1:{port}/file")
    finally:
        peer.kill()
        peer.wait()
    rate = megabytes / ours
    return {
        "megabytes": megabytes, "push_s": round(pushed, 2), "get_mib_per_s": round(rate), "ratio_to_http_server":
        round(ours / theirs, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--kilobytes", type=int, default=256, help="size of an adapter")
    parser.add_argument("--writes", type=float, default=0.2, help="share of pushes")
    parser.add_argument("--megabytes", type=int, default=200, help="size of the large adapter; 0 leaves it out")
    parser.add_argument("--json", help="a file, or - for stdout")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, "--port", "0", "--store", str(place / "store")],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        try:
            assert server.stdout is not None
            host = server.stdout.readline().strip().removeprefix("http://")
            time.sleep(2)
            found = {"clients": options.clients, "seconds": options.seconds, "writes": options.writes}
            found |= load(host, psutil.Process(server.pid), options)
            if options.megabytes:
                found["large"] = large(host, place, options.megabytes)
        finally:
            server.kill()
            server.wait()
        verify = "from hub.store import Store; import sys; print(len(Store(sys.argv[1]).verify()))"
        done = subprocess.run(
            [sys.executable, "-c", verify, str(place / "store")], capture_output=True, text=True, check=True
        )
        found["problems_in_the_store_afterwards"] = int(done.stdout)
    found["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    text = json.dumps(found, indent=2)
    if options.json and options.json != "-":
        Path(options.json).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
