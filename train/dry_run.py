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
from rich.text import Text
from torch import Tensor, nn

from compose.base.fingerprint import ADAPTERS
from compose.base.text_config import fact
from compose.runtime.model_runtime import runtime
from hub.console.output import bytes_text
from train.config import TrainConfig, span_in_steps
from train.data.batches import IGNORE, Dataset, epoch_order
from train.loop import training
from train.pipeline import PreparedRun
from train.steps.evaluate import amp

__all__ = ["Preview", "preview", "show"]

_OPTIMIZER_BYTES = {"adamw": 8.0, "paged_adamw_32bit": 8.0, "adamw_8bit": 2.06, "paged_adamw_8bit": 2.06}  # a weight


@dataclass(frozen=True)
class Preview:
    """Figures of a run that has not started; bytes and seconds."""

    base: str
    method: str
    sites: tuple[str, ...]
    trainable: int  # numbers that train; a method may store fewer
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


def preview(ready: PreparedRun) -> Preview:
    """Measure one micro-batch and count the rest; the adapter is left as it was."""
    config, data, adapter = ready.config, ready.splits.train, ready.adapter
    size = min(config.micro_batch or config.batch_size, len(data))
    trained = [p for p in adapter.parameters() if p.requires_grad]
    longest = torch.argsort(data.lengths, descending=True)[:size]
    kept, _ = _measure(ready, longest, config)
    if config.gradient_checkpointing:  # what the backward pass makes anew is one block's at a time
        whole, _ = _measure(ready, longest, config.model_copy(update={"gradient_checkpointing": False}))
        kept += (whole - kept) // int(fact(ready.model.config, "num_hidden_layers", 1))
    typical = torch.argsort(data.lengths)[len(data) // 2 - size // 2 :][:size]
    _, seconds = _measure(ready, typical, config)
    steps = span_in_steps(config.duration, math.ceil(len(data) / config.batch_size))
    weights = sum(p.numel() for p in trained)
    bases = [(name, p) for name, p in ready.model.named_parameters() if not name.startswith(ADAPTERS)]
    module_of = runtime(ready.model).sites.module_of
    layers = {path: _base_layer(ready.model, path) for path in map(module_of, adapter.paths)}
    return Preview(
        base=config.base,
        method=config.method,
        sites=tuple(adapter.paths),
        trainable=weights,
        changed=sum(_count(p) for layer in layers.values() if layer is not None for p in layer.parameters()),
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


def _measure(ready: PreparedRun, rows: Tensor, config: TrainConfig) -> tuple[int, float]:
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
    started = time.perf_counter()
    with training(model, ready.adapter, config, noise=ready.method.noise), amp(device, config.precision):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = ready.method.loss(model, batch, data.task)
        loss.backward()  # type: ignore[no-untyped-call]
    seconds = time.perf_counter() - started
    ready.adapter.zero_grad(set_to_none=True)
    return sum(kept.values()), seconds


def _count(parameter: Tensor) -> int:
    """Weights held, also where bitsandbytes packs two of them into a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else parameter.numel()


def _base_layer(model: nn.Module, path: str) -> nn.Module | None:
    """What an adapter acts on there; None for a place that is no module, such as the final hidden states."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _padding(data: Dataset, config: TrainConfig) -> float:
    """Expected share of padding when rows are batched as the first epoch batches them."""
    order = epoch_order(data, config.seed, 0, config.batch_size, group_by_length=config.group_by_length)
    micros = torch.split(order, config.micro_batch or config.batch_size)
    padded = sum(int(data.lengths[rows].max()) * len(rows) for rows in micros)
    return 1 - int(data.lengths.sum()) / padded


def show(figures: Preview, ready: PreparedRun, console: Console) -> None:
    """Print the figures and the first example; what it learns is green, or between «» where there is no colour."""
    share = 100 * figures.trainable / figures.total
    rank = f", rank {figures.rank}" if figures.rank else ""
    for name, value in (
        ("base", f"{figures.base}, {figures.total:,} parameters"),
        ("method", f"{figures.method}{rank}"),
        ("sites", f"{len(figures.sites)}: {_shorten(figures.sites)}" if figures.sites else "none"),
        ("trainable", f"{figures.trainable:,} ({share:.2f}% of the base), acting on {figures.changed:,} base weights"),
        ("data", f"{figures.rows:,} rows, {figures.items:,} items to learn, {figures.held_out_rows:,} rows held out"),
        ("padding", f"{100 * figures.padding:.0f}% of the tokens computed"),
        ("steps", f"{figures.steps:,}"),
        ("memory", " + ".join(f"{name} {bytes_text(n)}" for name, n in figures.memory.items())),
        ("", f"= about {bytes_text(sum(figures.memory.values()))}, without the libraries"),
        ("time", f"about {_duration(figures.seconds)} and evaluations, at the speed of one micro-batch here"),
    ):
        console.print(Text.assemble((name.ljust(11), "bold"), value), soft_wrap=True)
    console.print(_first_example(ready, console), soft_wrap=True)


def _first_example(ready: PreparedRun, console: Console) -> Text:
    data, decode = ready.splits.train, ready.tokenizer.decode
    batch = data.batch(torch.tensor([0]))
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    text = Text.assemble(("first example: ", "bold"))
    if data.task not in ("causal_lm", "token_classification"):  # the answer stands apart from what is read
        number = data.task == "regression"
        answer = f"{labels:g}" if number else data.labels[int(labels)] if data.labels else decode(labels)
        text.append(decode(ids), style="dim")
        return text.append(_marked(f" {answer} ", console), style="green")
    learned = (labels != IGNORE).tolist()
    learned[0] &= data.task != "causal_lm"  # nothing predicts the first token
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


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
