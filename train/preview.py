"""What a run would cost, before it starts: sites, counts, memory and time, and what its first example teaches.

Memory and time are measured, not guessed: the longest micro-batch goes through the model once, forward and backward,
while every tensor that is kept for the backward pass is counted.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from compose.inject import runtime
from train.batches import IGNORE, Dataset
from train.config import TrainConfig, span_in_steps
from train.evaluate import amp
from train.method import Method
from train.run import Prepared

__all__ = ["Preview", "preview", "show"]

_OPTIMIZER_BYTES = {"adamw": 8.0, "paged_adamw_32bit": 8.0, "adamw_8bit": 2.06, "paged_adamw_8bit": 2.06}  # a weight


@dataclass(frozen=True)
class Preview:
    """Figures of a run that has not started; bytes and seconds."""

    base: str
    method: str
    sites: tuple[str, ...]
    trainable: int  # parameters that are trained and stored
    changed: int  # weights of the base that they act on
    total: int  # weights of the base
    rank: int | None
    rows: int
    items: int
    held_out_rows: int
    padding: float  # share of a step's tokens that is padding, at the mean
    steps: int
    memory: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Values for scripts."""
        return {**vars(self), "sites": list(self.sites), "memory_total": sum(self.memory.values())}


def preview(ready: Prepared) -> Preview:
    """Measure one micro-batch and count the rest; the adapter is left as it was."""
    config, data, adapter, method = ready.config, ready.splits.train, ready.adapter, ready.method
    size = min(config.micro_batch or config.batch_size, len(data))
    trained = [p for p in adapter.parameters() if p.requires_grad]
    longest = torch.argsort(data.lengths, descending=True)[:size]
    kept, _ = _measure(config, ready, longest, method)
    typical = torch.argsort(data.lengths)[len(data) // 2 - size // 2 :][:size]
    _, seconds = _measure(config, ready, typical, method)
    steps = span_in_steps(config.duration, math.ceil(len(data) / config.batch_size))
    weights = sum(p.numel() for p in trained)
    bases = [(name, p) for name, p in ready.model.named_parameters() if not name.startswith("moduloom_adapters.")]
    module_of = runtime(ready.model).sites.module_of
    sites = {path: _base_layer(ready.model, path) for path in map(module_of, adapter.paths)}
    return Preview(
        base=config.base,
        method=config.method,
        sites=tuple(adapter.paths),
        trainable=weights,
        changed=sum(_count(p) for layer in sites.values() for p in layer.parameters()),
        total=sum(_count(p) for _, p in bases),
        rank=getattr(getattr(adapter, "config", None), "r", None),
        rows=len(data),
        items=int(data.items.sum()),
        held_out_rows=len(ready.splits.eval) if ready.splits.eval is not None else 0,
        padding=_padding(data, config),
        steps=steps,
        memory={
            "base": sum(p.numel() * p.element_size() for _, p in bases),
            "adapter and gradients": 2 * sum(p.numel() * p.element_size() for p in trained),
            "optimizer": int(weights * _OPTIMIZER_BYTES[config.optimizer]),
            "activations": kept,
        },
        seconds=seconds * steps * config.batch_size / size,
    )


def _measure(config: TrainConfig, ready: Prepared, rows: Tensor, method: Method) -> tuple[int, float]:
    """Bytes kept for the backward pass, and seconds of forward and backward."""
    data, model = ready.splits.train, ready.model
    device = next(ready.adapter.parameters()).device
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = {name: value.to(device) for name, value in data.batch(rows).items()}
    model.train()
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]), amp(device, config.precision):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = method.loss(model, batch, data.task)
        loss.backward()  # type: ignore[no-untyped-call]
    seconds = time.perf_counter() - started
    model.eval()
    ready.adapter.zero_grad(set_to_none=True)
    return sum(kept.values()), seconds


def _count(parameter: Tensor) -> int:
    """Weights held, also where bitsandbytes packs two of them into a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else parameter.numel()


def _base_layer(model: nn.Module, path: str) -> nn.Module:
    module = model.get_submodule(path)
    inner = getattr(module, "base_layer", None)
    return inner if isinstance(inner, nn.Module) else module


def _padding(data: Dataset, config: TrainConfig) -> float:
    """Expected share of padding when rows are batched as the first epoch batches them."""
    from train.batches import epoch_order

    order = epoch_order(data, config.seed, 0, config.batch_size, group_by_length=config.group_by_length)
    micros = torch.split(order, config.micro_batch or config.batch_size)
    padded = sum(int(data.lengths[rows].max()) * len(rows) for rows in micros)
    return 1 - int(data.lengths.sum()) / padded


def show(found: Preview, ready: Prepared, console: Console) -> None:
    """Print the figures and the first example; what it learns is green, or between «» where there is no colour."""
    table = Table(box=None, show_header=False, pad_edge=False)
    share = 100 * found.trainable / found.total
    rank = f", rank {found.rank}" if found.rank else ""
    for name, value in (
        ("base", f"{found.base}, {found.total:,} parameters"),
        ("method", f"{found.method}{rank}"),
        ("sites", f"{len(found.sites)}: {_shorten(found.sites)}"),
        ("trainable", f"{found.trainable:,} ({share:.2f}% of the base), acting on {found.changed:,} base weights"),
        ("data", f"{found.rows:,} rows, {found.items:,} items to learn, {found.held_out_rows:,} rows held out"),
        ("padding", f"{100 * found.padding:.0f}% of the tokens computed"),
        ("steps", f"{found.steps:,}"),
        ("memory", " + ".join(f"{name} {_bytes(n)}" for name, n in found.memory.items())),
        ("", f"= about {_bytes(sum(found.memory.values()))}, without the libraries"),
        ("time", f"about {_duration(found.seconds)} and evaluations, at the speed of one micro-batch here"),
    ):
        table.add_row(Text(name, style="bold"), value)
    console.print(table)
    console.print(_first_example(ready, console))


def _first_example(ready: Prepared, console: Console) -> Text:
    data, decode = ready.splits.train, ready.tokenizer.decode
    batch = data.batch(torch.tensor([0]))
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    text = Text("first example: ", style="bold")
    if labels.dim() == 0:
        text.append(decode(ids), style="dim")
        return text.append(_marked(f" {data.labels[int(labels)]} ", console), style="green")
    learned = (labels != IGNORE).tolist()
    learned[0] = False  # nothing predicts the first token
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or learned[end] != learned[start]:
            part = decode(ids[start:end])
            text.append(_marked(part, console) if learned[start] else part, style="green" if learned[start] else "dim")
            start = end
    return text


def _marked(text: str, console: Console) -> str:
    return text if console.color_system else f"«{text}»"


def _shorten(paths: tuple[str, ...]) -> str:
    """`model.layers.*.self_attn.q_proj` for the paths of all layers, in order."""
    kinds = dict.fromkeys(".".join("*" if part.isdigit() else part for part in path.split(".")) for path in paths)
    return ", ".join(kinds)


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
