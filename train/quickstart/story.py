"""The quickstart from top to bottom: train, push, pull, compose, route, measure."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import AutoConfig, PreTrainedModel

import compose
from compose.base.location import locate
from compose.base.text_config import text_config
from compose.runtime.model_runtime import runtime
from hub.remotes.directory import DirectoryRemote
from hub.store import Store
from hub.transfer import pull
from train.quickstart.corpus import Domain
from train.quickstart.experts import Expert, Trainer, configuration
from train.quickstart.measure import (
    DomainResult,
    Judge,
    StreamResult,
    make_streams,
    measure_domains,
    measure_streams,
)

MOST_THREADS = 8  # a model of a few million parameters gains nothing from more


@dataclass(frozen=True)
class Options:
    """What the user chose."""

    out: Path
    base: str = "builtin:tiny-lm"
    quantize: str = "nf4"
    kind: str = "lora"
    seed: int = 0
    steps: int = 50  # training steps an expert
    home: Path | None = None  # of the local store; None is the default one


@dataclass(frozen=True)
class Story:
    """Everything a run found out."""

    options: Options
    domains: tuple[Domain, ...]
    experts: tuple[Expert, ...]
    results: tuple[DomainResult, ...]
    stream: StreamResult
    stores: tuple[str, str]
    parameters: int
    machine: Mapping[str, Any]
    started: float  # time.perf_counter() when the command began

    @property
    def seconds(self) -> float:
        """Seconds since the command began."""
        return round(time.perf_counter() - self.started, 1)


def run(options: Options, domains: Sequence[Domain], console: Console, *, started: float | None = None) -> Story:
    """Run the whole story; chatter and progress go to the console.

    Raises
    ------
    HubError
        An unknown base or kind, a store or folder that cannot be written.
    """
    started = time.perf_counter() if started is None else started
    torch.set_num_threads(min(torch.get_num_threads(), usable_cpus(), MOST_THREADS))
    options.out.mkdir(parents=True, exist_ok=True)
    local, second = Store(options.home), Store(options.out / "store")
    with local.lock(), second.lock():
        pass  # a store that cannot be written is an error now, not after the training
    tokenizer = compose.tokenizer(options.base)
    with _progress(console) as progress:
        experts = train_all(options, domains, tokenizer, local, progress, console)
        for expert in experts:
            pull(second, DirectoryRemote(str(local.root)), expert.artifact.ref)
        pulled = f"pulled {len(experts)} experts from {local.root} into {second.root}, every byte checked"
        console.print(pulled, highlight=False, soft_wrap=True)
        model = load(options, experts, second)
        adapters = sum(p.numel() for adapter in runtime(model).adapters.values() for p in adapter.parameters())
        judge = Judge(model, tokenizer, [domain.name for domain in domains])
        with _task(progress, "held-out documents", sum(len(d.heldout) for d in domains)) as advance:
            results = measure_domains(judge, domains, advance)
        streams = make_streams(judge, domains, seed=options.seed)
        with _task(progress, "streams", len(streams)) as advance:
            stream = measure_streams(judge, streams, advance)
    return Story(
        options,
        tuple(domains),
        tuple(experts),
        tuple(results),
        stream,
        (str(local.root), str(second.root)),
        model.num_parameters() - adapters,
        machine(),
        started,
    )


def train_all(
    options: Options, domains: Sequence[Domain], tokenizer: Any, local: Store, progress: Progress, console: Console
) -> list[Expert]:
    """Train what is not in the local store yet, and publish it there."""
    width = text_config(AutoConfig.from_pretrained(locate(options.base).directory)).hidden_size
    config = configuration(
        options.base,
        quantize=options.quantize,
        kind=options.kind,
        seed=options.seed,
        steps=options.steps,
        width=width,
    )
    trainer = Trainer(local, config, tokenizer, lambda: load(options), progress)
    experts = []
    with _task(progress, "experts", len(domains)) as advance:
        for domain in domains:
            expert = trainer.expert(domain)
            how = f"trained in {expert.seconds:.0f} s and pushed" if expert.trained else "trained already"
            console.print(f"{expert.artifact.ref}: {how}", highlight=False, soft_wrap=True)
            experts.append(expert)
            advance(1)
    return experts


def load(options: Options, experts: Sequence[Expert] | None = None, store: Store | None = None) -> PreTrainedModel:
    """Load the quantized base, with the experts of a store attached under the names of their domains."""
    attached = {expert.domain: store.get(expert.artifact.ref) for expert in experts} if experts and store else {}
    # Half precision has no fast kernels on most CPUs.
    dtype = None if torch.cuda.is_available() else torch.float32
    return compose.load(options.base, quantize=options.quantize, dtype=dtype, adapters=attached)


def usable_cpus() -> int:
    """CPUs this process may use: its affinity, and the quota of its control group where there is one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    words = quota.read_text().split() if quota.is_file() else []
    if len(words) == 2 and words[0].isdigit():
        count = min(count, max(1, int(words[0]) // int(words[1])))
    return count


def peak_rss_mb() -> float | None:
    """Largest resident memory of this process so far, in MB (10^6 bytes); None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "system": platform.system(),
        "processor": _processor(),
        "cpus": usable_cpus(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@contextmanager
def _task(progress: Progress, label: str, total: int) -> Iterator[Callable[[int], None]]:
    task = progress.add_task(label, total=total, status="")
    try:
        yield lambda count: progress.advance(task, count)
    finally:
        progress.remove_task(task)
