"""The optimizer and its learning rate, a pure function of the step."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from train.config import TrainConfig
from train.errors import TrainError

__all__ = ["learning_rate", "make_optimizer"]

log = logging.getLogger(__name__)


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Rate of step `step` (from 0) of `total`.

    With `W = round(warmup * total)` and `u = (step - W) / (total - W)`: `lr (step + 1) / (W + 1)` while `step < W`,
    then `lr` (constant), `lr (1 - u)` (linear) or `lr (1 + cos(pi u)) / 2` (cosine). No step has rate 0.
    """
    rising = round(config.warmup * total)
    if step < rising:
        return config.lr * (step + 1) / (rising + 1)
    past = (step - rising) / max(1, total - rising)
    factor = {"constant": 1.0, "linear": 1 - past, "cosine": (1 + math.cos(math.pi * past)) / 2}[config.schedule]
    return config.lr * factor


def make_optimizer(
    config: TrainConfig, groups: list[dict[str, Any]], *, heads: Iterable[nn.Parameter] = ()
) -> Optimizer:
    """AdamW of torch, or one of bitsandbytes (8-bit state: arXiv 2110.02861; paged: arXiv 2305.14314).

    Parameters among `heads` have groups of their own, at `head_lr` where the others have `lr`. Paged memory lies
    between a GPU and its host; on a CPU the same update runs unpaged, with a notice.
    """
    groups = _apart(config, groups, {id(parameter) for parameter in heads})
    device = groups[0]["params"][0].device
    name: str = config.optimizer
    if name.startswith("paged_") and device.type == "cpu":
        unpaged = {"paged_adamw_32bit": "adamw", "paged_adamw_8bit": "adamw_8bit"}[name]
        log.warning("%s needs a GPU to page to; on this CPU %s makes the same update without paging", name, unpaged)
        name = unpaged
    if name == "adamw":
        fused = device.type in ("cpu", "cuda") and all(p.is_floating_point() for g in groups for p in g["params"])
        return torch.optim.AdamW(groups, lr=config.lr, fused=fused)
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise TrainError(f"optimizer {name} needs bitsandbytes", hint="pip install bitsandbytes") from error
    kinds = {
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw_32bit": optim.PagedAdamW32bit,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
    }
    optimizer: Optimizer = kinds[name](groups, lr=config.lr)
    return optimizer


def _apart(config: TrainConfig, groups: list[dict[str, Any]], heads: set[int]) -> list[dict[str, Any]]:
    """Each group in two, without heads and of heads alone; empty ones are dropped."""
    factor = (config.head_lr or config.lr) / config.lr
    apart = []
    for group in groups:
        body, head = ([p for p in group["params"] if (id(p) in heads) is carried] for carried in (False, True))
        apart.append({**group, "params": body})
        apart.append({**group, "params": head, "lr_scale": group.get("lr_scale", 1.0) * factor})
    return [group for group in apart if group["params"]]
