"""A batch whose rows use different LoRA adapters: a decoding step and a prefill, against PEFT's ``adapter_names``.

    python tests/benchmarks/bench_mixed_batch.py [--adapters 1,4,8,16,32,64] [--json FILE|-]

Prints one row for each number of adapters and phase. ``ours`` and ``peft`` are ratios to the bare base: the median over
rounds of (time of that round) / (time of the base in the same round), the three run in turn.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from bench_tools import interleave, llama, machine, ratio, report, shape_options
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from compose import inject
from compose.kind import get_kind, make_config

Call = Callable[[], Any]


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapters", default="1,4,8,16,32,64", help="how many adapters, one table row each")
    shape_options(parser, rows=32, prompt=32, layers=8, width=512, vocabulary=1024, rank=8, rounds=25)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    torch.manual_seed(0)
    counts = sorted({int(n) for n in options.adapters.split(",")})
    bench = Bench(options, most=max(counts))
    with torch.inference_mode():
        rows = [row for count in counts for row in bench.measure(count)]
    found = {"machine": machine(), "model": vars(options), "rows": rows, "largest_difference": bench.difference}
    report(found, ("adapters", "phase", "base_ms", "ours", "peft"), options.json, sys.stdout)


class Bench:
    """Three models with the same weights: bare, with our adapters, and with PEFT's."""

    def __init__(self, options: argparse.Namespace, most: int) -> None:
        self.options = options
        self.bare = llama(options)
        self.ours, self.theirs = _with_adapters(self.bare, options.rank, most)
        self.ids = torch.randint(options.vocabulary, (options.rows, options.prompt))
        self.token = torch.randint(options.vocabulary, (options.rows, 1))
        self.difference = 0.0

    def measure(self, count: int) -> list[dict[str, Any]]:
        """Both phases with ``count`` adapters, dealt out to the rows in turn."""
        names = [f"a{i % count}" for i in range(self.options.rows)]
        inject.activate(self.ours, names if count > 1 else names[0])
        extra = {"adapter_names": names}
        self._check(extra)
        found = []
        for phase in ("decode", "prefill"):
            calls = {
                "base": self._call(self.bare, phase, {}),
                "ours": self._call(self.ours, phase, {}),
                "peft": self._call(self.theirs, phase, extra),
            }
            times = interleave(calls, self.options.rounds)
            found.append(
                {
                    "adapters": count,
                    "phase": phase,
                    "ours": ratio(times["ours"], times["base"]),
                    "peft": ratio(times["peft"], times["base"]),
                    "base_ms": sorted(times["base"])[len(times["base"]) // 2] * 1e3,
                }
            )
        return found

    def _call(self, model: Any, phase: str, extra: dict[str, Any]) -> Call:
        if phase == "prefill":
            return lambda: model(input_ids=self.ids, **extra)
        cache = model(input_ids=self.ids, use_cache=True, **extra).past_key_values

        def step() -> Tensor:
            logits: Tensor = model(input_ids=self.token, past_key_values=cache, **extra).logits
            cache.crop(-1)
            return logits

        return step

    def _check(self, extra: dict[str, Any]) -> None:
        """Both compute the same thing, in both phases; otherwise there is nothing to compare."""
        for phase in ("prefill", "decode"):
            ours, theirs = self._call(self.ours, phase, {})(), self._call(self.theirs, phase, extra)()
            ours, theirs = (getattr(out, "logits", out) for out in (ours, theirs))
            worst = float((ours - theirs).abs().max())
            scale = float(theirs.abs().max())
            if worst > 1e-4 * scale:
                raise SystemExit(f"ours and PEFT's logits differ by {worst:g} in {phase}: nothing to compare")
            self.difference = max(self.difference, worst)


def _with_adapters(bare: PreTrainedModel, rank: int, count: int) -> tuple[Any, Any]:
    ours, theirs = copy.deepcopy(bare), copy.deepcopy(bare)
    runtime, kind = inject.runtime(ours), get_kind("lora")
    config = make_config(kind, {"r": rank, "target_modules": "all-linear"})
    peft_config = LoraConfig(r=rank, target_modules="all-linear")
    wrapped: PeftModel | None = None
    for i in range(count):
        adapter = runtime.add(f"a{i}", kind(config, runtime.sites, ours, name=f"a{i}", seed=i))
        for key, value in adapter.state().items():
            if "lora_B" in key:
                value.normal_(std=0.02)
        adapter.freeze()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if wrapped is None:
                wrapped = get_peft_model(theirs, peft_config, adapter_name="a0")
            else:
                wrapped.add_adapter(f"a{i}", peft_config)
        _copy(adapter.state(), wrapped, f"a{i}")
    assert wrapped is not None
    return ours, wrapped.eval()


def _copy(state: dict[str, Tensor], wrapped: PeftModel, name: str) -> None:
    for key, value in state.items():
        path, factor = key.removesuffix(".weight").rsplit(".", 1)
        getattr(wrapped.get_submodule(path), factor)[name].weight.data.copy_(value)


if __name__ == "__main__":
    main()
