"""How fast the index of a store is made anew, and how fast it answers when it holds 100,000 artifacts.

    python tests/benchmarks/bench_index.py [--manifests 20000] [--artifacts 100000] [--rounds 7] [--json FILE|-]

The rebuild reads the log and every manifest from the disk (each about 12 KB, a LoRA over 24 tensors) and writes the
SQLite index and ``index.json``. The questions are those of `hub list` and `hub search`, each by a new `Store`, so
that nothing is warm but the disk's cache; beside the median, the slowest of the rounds and the least CPU time.
"""

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from hub.manifest import BaseIdentity, Manifest, weights_fingerprint
from hub.storage.ledger import Event, Position, line_of
from hub.storage.oci import image_manifest
from hub.store import Store

TASKS = ("chat", "nli", "ner", "summarization", "translation", "code", "math", "sentiment")
KINDS = ("lora", "ia3", "dora", "prefix", "bottleneck")
WORDS = ("tone", "legal", "medical", "recipe", "support", "poetry", "chess", "weather", "tax", "garden")
VERSIONS = 4  # of each name
DIGEST = "sha256:" + "5" * 64


def identity(number: int) -> BaseIdentity:
    weights = {f"model.layers.{i}.weight": f"{number:08x}{i:08x}" for i in range(8)}
    return BaseIdentity(
        repo=f"org/base-{number}",
        arch_digest=DIGEST,
        weights_fingerprint=weights_fingerprint(weights),
        weights=weights,
        config_digest=DIGEST,
        vocab_size=32000,
    )


def manifests(count: int) -> Iterator[tuple[str, str, bytes]]:
    """Name, version and canonical bytes of synthetic manifests: templates whose name, number and figures change."""
    tensors = [
        {"name": f"base_model.model.model.layers.{i // 2}.self_attn.q_proj.lora_{'AB'[i % 2]}.weight", "dtype": "F32"}
        | {"shape": (8, 4096), "sha256": f"{i:064x}"}
        for i in range(24)
    ]
    files = [
        {"path": path, "sha256": "7" * 64, "size": 10**6 + i} for i, path in enumerate(("a.json", "b.safetensors"))
    ]
    templates = []
    for number in range(40):
        task, kind = TASKS[number % 8], KINDS[number % 5]
        manifest = Manifest(
            name="acme/NAME".lower(), version="999999", kind=kind, method=kind, task=task, base=identity(number % 9),
            labels=("yes", "no"), languages=("en", "de")[: 1 + number % 2], domains=(WORDS[number % 10],),
            metrics=tuple({"dataset": "d", "metric": m, "value": v} for m, v in (("f1", 0.515625), ("loss", 2.5))),
            lineage={"parents": ("acme/parent@1.0",), "run": "r"}, license="MIT",
            summary=f"{kind} for {task} about {WORDS[number % 10]}", files=files, tensors=tensors,
            tensors_digest=DIGEST, created="2026-01-01T00:00:00Z",
        )  # fmt: skip
        templates.append(manifest.canonical)
    for i in range(count):
        name, version = f"ns{i // VERSIONS % 50}/{WORDS[i % 10]}-{i // VERSIONS}", f"1.{i % VERSIONS}"
        data = (
            templates[i % 40]
            .replace(b'"acme/name"', f'"{name}"'.encode())
            .replace(b'"999999"', f'"{version}"'.encode())
        )
        data = data.replace(b"0.515625", f"0.{i % 1000 + 1000}".encode())
        yield name, version, data


def fill(store: Store, count: int) -> None:
    """Write blobs and log as `count` publications would, without their fsyncs."""
    store.create()
    at, lines = Position(), []
    for name, version, data in manifests(count):
        digest = hashlib.sha256(data).hexdigest()
        store.blobs.path(f"sha256:{digest}").write_bytes(data)
        image = image_manifest(data)
        store.blobs.path(f"sha256:{hashlib.sha256(image).hexdigest()}").write_bytes(image)
        line = line_of(Event("publish", name, f"sha256:{digest}", version=version), at)
        lines.append(line + b"\n")
        at = Position(at.offset + len(line) + 1, at.seq + 1, f"sha256:{hashlib.sha256(line).hexdigest()}")
    store.ledger.path.write_bytes(b"".join(lines))


QUESTIONS: dict[str, dict[str, object]] = {
    "list --base --task": {"base": "org/base-3", "task": "code"},
    "list --base --task --sort f1": {"base": "org/base-3", "task": "code", "sort": "f1", "limit": 50},
    "list --kind, newest": {"kind": "dora", "newest": True, "limit": 50},
    "list --sort f1": {"sort": "f1", "limit": 50},
    "list --sort created": {"sort": "created", "limit": 50},
    "list --name": {"name": "ns3/chess-6"},
    "list --name *": {"name": "ns3/chess-*", "limit": 50},
    "list --namespace": {"namespace": "ns7", "limit": 50},
    "list --label --language": {"label": "yes", "language": "de", "limit": 50},
    "search: one word": {"text": "poetry", "limit": 50},
    "search: two words": {"text": "legal nli", "limit": 50},
    "search: a prefix + base": {"text": "trans", "base": "org/base-4", "limit": 50},
    "search: a rare word": {"text": "chess-777", "limit": 50},
}


def seconds(job: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    job()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--manifests", type=int, default=20_000)
    parser.add_argument("--artifacts", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report: dict[str, object] = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
    with tempfile.TemporaryDirectory() as directory:
        store = Store(Path(directory) / "store")
        fill(store, options.manifests)
        spent = [seconds(store.rebuild_index) for _ in range(3)]
        busy = [seconds(store.rebuild_index, time.process_time) for _ in range(3)]
        report["rebuild: manifests/s"] = options.manifests / min(spent)
        report["rebuild: manifests per CPU second"] = options.manifests / min(busy)
        report["verify the log: events/s"] = options.manifests / seconds(lambda: list(store.ledger.read()))
    with tempfile.TemporaryDirectory() as directory:
        store = Store(Path(directory) / "store")
        fill(store, options.artifacts)
        report["first list: s"] = seconds(lambda: Store(store.root).list(limit=1))
        for label, question in QUESTIONS.items():
            wall, busy = [], []
            for _ in range(options.rounds):
                start = time.process_time()
                wall.append(1000 * seconds(lambda q=question: Store(store.root).list(**q)))
                busy.append(1000 * (time.process_time() - start))
            report[f"{label}: ms"] = [median(wall), max(wall), min(busy), len(Store(store.root).list(**question))]
    for name, value in report.items():
        text = value if isinstance(value, str) else f"{value:.1f}" if isinstance(value, float) else None
        print(f"{name:<36} {text or '{:7.1f}  worst {:7.1f}  CPU {:7.1f}  ({} found)'.format(*value)}", file=sys.stderr)
    if options.json is not None:
        text = json.dumps(report, indent=2)
        print(text) if str(options.json) == "-" else options.json.write_text(text)


if __name__ == "__main__":
    main()
