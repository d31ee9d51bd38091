"""A batch whose rows use different LoRA adapters: a decoding step and a prefill, against PEFT's ``adapter_names``.

    python tests/benchmarks/bench_mixed_batch.py [--adapters 1,4,8,16,32,64,256] [--resident 1000]
        [--kinds lora,ia3,...] [--plot FILE]

Prints one row for each number of adapters and phase. ``ours`` and ``peft`` are ratios to the bare base: the median over
rounds of (time of that round) / (time of the base in the same round), the three run in turn. With ``--kinds`` the
adapters are of these kinds in turn, and PEFT, which has no such batch, is left out. More adapters than rows: the others
are resident, and the rows use as many as there are rows; ``--resident`` makes our model hold so many in each row of the
table. PEFT takes part up to ``--peft`` adapters, as it takes long to add many; a dash stands for the rest.
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

from compose.kind.registry import get_kind, make_config
from compose.runtime.model_runtime import activate, runtime

Call = Callable[[], Any]


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapters", default="1,4,8,16,32,64,256", help="how many adapters, one table row each")
    parser.add_argument("--kinds", default="", help="kinds of the adapters in turn, e.g. lora,dora,ia3,bias,bottleneck")
    parser.add_argument("--resident", type=int, default=0, help="how many adapters our model holds, at least")
    parser.add_argument("--peft", type=int, default=64, help="most adapters that PEFT is measured with")
    parser.add_argument("--plot", metavar="FILE", help="draw ratio against number of adapters as SVG")
    shape_options(parser, rows=32, prompt=32, layers=8, width=512, vocabulary=1024, rank=8, rounds=25)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    torch.manual_seed(0)
    counts = sorted({int(n) for n in options.adapters.split(",")})
    bench = (Mixed if options.kinds else Bench)(options, most=max(*counts, options.resident))
    with torch.inference_mode():
        rows = [row for count in counts for row in bench.measure(count)]
    found = {"machine": machine(), "model": vars(options), "rows": rows, "largest_difference": bench.difference}
    columns = ("adapters", "phase", "base_ms", "ours", "peft")
    report(found, columns[:-1] if options.kinds else columns, options.json, sys.stdout)
    if options.plot:
        plot(rows, options)


class Bench:
    """Three models with the same weights: bare, with our adapters, and with PEFT's."""

    def __init__(self, options: argparse.Namespace, most: int) -> None:
        self.options = options
        self.bare = llama(options)
        self.ours, self.theirs = _with_adapters(self.bare, options.rank, most, most_peft=min(most, options.peft))
        self.ids = torch.randint(options.vocabulary, (options.rows, options.prompt))
        self.token = torch.randint(options.vocabulary, (options.rows, 1))
        self.difference = 0.0

    def measure(self, count: int) -> list[dict[str, Any]]:
        """Both phases with ``count`` adapters, dealt out to the rows in turn."""
        names = [f"a{i % count}" for i in range(self.options.rows)]
        activate(self.ours, names if count > 1 else names[0])
        extra = {"adapter_names": names}
        beside = count <= self.options.peft
        self._check(extra) if beside else self._check_rows(names)
        found = []
        for phase in ("decode", "prefill"):
            calls = {"base": self._call(self.bare, phase, {}), "ours": self._call(self.ours, phase, {})}
            if beside:
                calls["peft"] = self._call(self.theirs, phase, extra)
            times = interleave(calls, self.options.rounds)
            found.append(
                {
                    "adapters": count,
                    "phase": phase,
                    "ours": ratio(times["ours"], times["base"]),
                    "peft": ratio(times["peft"], times["base"]) if beside else "-",
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

    def _check_rows(self, names: list[str]) -> None:
        """Each row is what its adapter alone computes."""
        together = self.ours(input_ids=self.ids).logits
        for row in range(min(len(names), 8)):
            activate(self.ours, names[row])
            alone = self.ours(input_ids=self.ids[row : row + 1]).logits[0]
            worst = float((together[row] - alone).abs().max())
            if worst > 1e-3 * float(alone.abs().max()):
                raise SystemExit(f"row {row} differs by {worst:g} from {names[row]} alone: nothing to measure")
            self.difference = max(self.difference, worst)
        activate(self.ours, names if len(set(names)) > 1 else names[0])


class Mixed(Bench):
    """The bare model, and one with adapters of several kinds."""

    def __init__(self, options: argparse.Namespace, most: int) -> None:
        self.options, self.difference = options, 0.0
        self.bare = llama(options)
        self.ours = copy.deepcopy(self.bare)
        kinds, home = options.kinds.split(","), runtime(self.ours)
        for i in range(most):
            kind = get_kind(kinds[i % len(kinds)])
            wanted = {"r": options.rank, "target_modules": "all-linear"} if "r" in kind.Config.model_fields else {}
            adapter = kind(make_config(kind, wanted), home.sites, self.ours, name=f"a{i}", seed=i)
            for parameter in adapter.parameters():
                parameter.data += 0.02 * torch.randn(parameter.shape)
            home.add(f"a{i}", adapter).freeze()
        self.ids = torch.randint(options.vocabulary, (options.rows, options.prompt))
        self.token = torch.randint(options.vocabulary, (options.rows, 1))

    def measure(self, count: int) -> list[dict[str, Any]]:
        """Both phases; each row must be what its adapter alone computes."""
        names = [f"a{i % count}" for i in range(self.options.rows)]
        activate(self.ours, names if count > 1 else names[0])
        self._check_rows(names)
        found = []
        for phase in ("decode", "prefill"):
            calls = {"base": self._call(self.bare, phase, {}), "ours": self._call(self.ours, phase, {})}
            times = interleave(calls, self.options.rounds)
            middle = sorted(times["base"])[len(times["base"]) // 2] * 1e3
            slower = ratio(times["ours"], times["base"])
            found.append({"adapters": count, "phase": phase, "ours": slower, "base_ms": middle})
        return found


def plot(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Cost against the number of adapters, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for side, mark in (("ours", "-o"), ("peft", "--s")):
        for phase in ("decode", "prefill"):
            points = [
                (row["adapters"], row[side])
                for row in rows
                if row["phase"] == phase and isinstance(row.get(side), float)
            ]
            if points:
                axes.plot(*zip(*points, strict=True), mark, label=f"{side}, {phase}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel(f"adapters in a batch of {options.rows} rows")
    axes.set_ylabel("time / bare base")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.legend()
    figure.savefig(options.plot, format="svg")
    print(f"wrote {options.plot}", file=sys.stderr)


def _with_adapters(bare: PreTrainedModel, rank: int, count: int, most_peft: int) -> tuple[Any, Any]:
    ours, theirs = copy.deepcopy(bare), copy.deepcopy(bare)
    home, kind = runtime(ours), get_kind("lora")
    config = make_config(kind, {"r": rank, "target_modules": "all-linear"})
    peft_config = LoraConfig(r=rank, target_modules="all-linear")
    wrapped: PeftModel | None = None
    for i in range(count):
        adapter = home.add(f"a{i}", kind(config, home.sites, ours, name=f"a{i}", seed=i))
        for key, value in adapter.state().items():
            if "lora_B" in key:
                value.normal_(std=0.02)
        adapter.freeze()
        if i >= most_peft:
            continue
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
