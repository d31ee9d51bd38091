"""Each token with the top 2 of E experts by Arrow: time and memory against PEFT's Arrow, side by side.

    python tests/benchmarks/bench_route_token.py [--experts 8,32,128] [--json FILE|-]

One row for each number of experts. ``ours`` and ``peft`` are times of a forward pass as ratios to the bare base, the
median over rounds, all run in turn; ``peft_to_ours`` is the ratio of what each adds to the base. ``ours_mib`` and
``peft_mib`` are the most that is held at once inside one attention projection beyond its output; ``memory`` is their
ratio. Both compute the same: that is checked first, with PEFT's prototypes converged.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from bench_tools import interleave, llama, machine, ratio, report, shape_options
from peft import ArrowConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel

from compose.kind.registry import get_kind, make_config
from compose.runtime.model_runtime import runtime
from router.bench import Batch, Bench
from router.gating import Gating
from router.router import Router

MIB = 2**20
SITE = "model.layers.0.self_attn.q_proj"


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experts", default="8,32,128", help="how many experts, one table row each")
    parser.add_argument("--top-k", type=int, default=2)
    shape_options(parser, rows=8, prompt=128, layers=2, width=512, vocabulary=1024, rank=8, rounds=5)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = [measure(count, options) for count in sorted({int(n) for n in options.experts.split(",")})]
    found = {"machine": machine(), "model": vars(options), "rows": rows}
    columns = ("experts", "base_ms", "ours", "peft", "peft_to_ours", "ours_mib", "peft_mib", "memory")
    report(found, columns, options.json, sys.stdout)


def measure(count: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    bare = llama(options)
    ours, theirs = with_arrow(bare, count, options)
    ids = torch.randint(options.vocabulary, (options.rows, options.prompt))
    difference = check(ours, theirs, ids)
    calls = {
        "base": lambda: bare(input_ids=ids),
        "ours": lambda: ours(input_ids=ids),
        "peft": lambda: theirs(input_ids=ids),
    }
    times = interleave(calls, options.rounds, warm=1)
    own, other = ratio(times["ours"], times["base"]), ratio(times["peft"], times["base"])
    x = torch.randn(options.rows, options.prompt, options.width)
    held = [
        (peak(lambda site=site: site(x)) - x.numel() * x.element_size()) / MIB  # its output is as large as x
        for site in (ours.get_submodule(SITE), theirs.get_base_model().get_submodule(SITE))
    ]
    return {
        "experts": count,
        "base_ms": sorted(times["base"])[options.rounds // 2] * 1e3,
        "ours": own,
        "peft": other,
        "peft_to_ours": (other - 1) / (own - 1),
        "ours_mib": held[0],
        "peft_mib": held[1],
        "memory": held[1] / held[0],
        "largest_difference": difference,
    }


def with_arrow(bare: PreTrainedModel, count: int, options: argparse.Namespace) -> tuple[Any, Any]:
    """The same experts under our router and under PEFT's, for all linear layers."""
    ours, theirs = copy.deepcopy(bare), copy.deepcopy(bare)
    home, kind = runtime(ours), get_kind("lora")
    config = make_config(kind, {"r": options.rank, "target_modules": "all-linear"})
    plain = LoraConfig(r=options.rank, target_modules="all-linear")
    wrapped: PeftModel | None = None
    for i in range(count):
        adapter = home.add(f"e{i}", kind(config, home.sites, ours, name=f"e{i}", seed=i))
        for key, value in adapter.state().items():
            if "lora_B" in key:
                value.normal_(std=0.02)
                value[:, 0] *= 8  # one direction stands out, so that power iterations find it
        adapter.freeze()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if wrapped is None:
                wrapped = get_peft_model(theirs, plain, adapter_name="task_0")
            else:
                wrapped.add_adapter(f"task_{i}", plain)
        for key, value in adapter.state().items():
            path, factor = key.removesuffix(".weight").rsplit(".", 1)
            getattr(wrapped.get_submodule(path), factor)[f"task_{i}"].weight.data.copy_(value)
    assert wrapped is not None
    _route_peft(wrapped, count, options)
    experts = {f"e{i}": f"e{i}" for i in range(count)}
    gating = Gating(top_k=options.top_k)
    router = Router.fit("arrow", Bench(ours, experts), options={"normalize": "none"}, gating=gating)
    router.activate(ours, Batch.of([torch.tensor([0])]))
    return ours, wrapped.eval()


def _route_peft(wrapped: PeftModel, count: int, options: argparse.Namespace) -> None:
    arrow = ArrowConfig(top_k=options.top_k, rng_seed=0)
    arrow.task_adapter_names = [f"task_{i}" for i in range(count)]
    arrow.gks_adapter_names = []
    config = LoraConfig(r=options.rank, target_modules="all-linear", arrow_config=arrow)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.add_adapter("arrow_router", config)
    wrapped.set_adapter("arrow_router")


def check(ours: Any, theirs: Any, ids: Tensor) -> float:
    """Largest difference of the logits, as a share of their size; both must agree but for tokens on an edge."""
    mine, other = ours(input_ids=ids).logits, theirs(input_ids=ids).logits
    apart = (mine - other).abs().amax(-1) / other.abs().max()  # (B, T)
    if float((apart > 1e-3).float().mean()) > 0.01:
        raise SystemExit(f"ours and PEFT's logits differ for {float((apart > 1e-3).float().mean()):.1%} of the tokens")
    return float(apart.median())


class _Held(TorchDispatchMode):
    """Bytes of the storages that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._known:
                    self._count(tensor, storage)
        return out

    def _count(self, tensor: Tensor, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)

        def gone() -> None:
            self.now -= size
            self._known.discard(key)

        weakref.finalize(storage, gone)


def peak(call: Callable[[], Any]) -> float:
    """Most bytes of new tensors that a call holds at once."""
    call()
    with _Held() as held:
        call()
    return held.most


if __name__ == "__main__":
    main()
