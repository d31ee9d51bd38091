"""Merging LoRAs: this project and peft side by side, each in a process of its own, on the same tensors.

    python tests/benchmarks/bench_merge.py [--dim 2048] [--sites 7] [--adapters 16] [--json FILE|-]

svd
    4 LoRAs of rank 16 at one square site, merged into one of rank 16. peft: ``combination_type="svd"``.
ties, dare, dare_ties
    16 LoRAs of rank 16 over square sites, merged entry by entry and written with rank 16. peft's comparable path is
    ``*_svd``, which merges dense deltas; its plain ``ties`` and ``dare_linear`` merge A and B apart, which is fast and
    computes something else (see tests/compose/merging/test_merge_peers.py). Time grows linearly with the sites and
    memory does not, so a few sites stand for 224; ``--sites 224`` runs them all.

Times are of the whole public call, the best of ten (peft: two) for svd and one run otherwise; the ratio in CPU time is
the one to trust on a machine that others use. Memory is the highest resident set above what was there before the call.
Set OMP_NUM_THREADS for a fixed number of threads.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANK = 16
PEFT = {"svd": "svd", "ties": "ties_svd", "dare": "dare_linear_svd", "dare_ties": "dare_ties_svd"}
OURS = {
    "svd": "svd({}, rank=16)",
    "ties": "ties({}, density=0.2, variant=peft)",
    "ties (paper)": "ties({}, density=0.2)",
    "dare": "dare({}, density=0.2)",
    "dare_ties": "dare_ties({}, density=0.2)",
}


def base(dim: int, layers: int) -> Any:
    """A Llama with square linears; 7 sites a layer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=dim,
        intermediate_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=dim // 64,
        num_key_value_heads=dim // 64,
    )
    return LlamaForCausalLM(config).eval()


def targets(method: str, sites: int) -> tuple[list[str], int]:
    """Suffixes of the linears to adapt and the number of layers."""
    if method == "svd":
        return ["q_proj"], 1
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return names, max(1, sites // len(names))


def ours(method: str, dim: int, sites: int, adapters: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The call, and a function that gives the merged delta of the first site."""
    import torch

    import compose
    from compose.merging.merge import merge
    from compose.runtime.model_runtime import runtime

    suffixes, layers = targets(method, sites)
    model = base(dim, layers)
    for i in range(adapters):
        config = {"r": RANK, "lora_alpha": RANK, "target_modules": tuple(suffixes)}
        adapter = compose.create(model, "lora", config, name=f"a{i}", seed=i)
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        adapter.freeze()
    text = OURS[method].format(", ".join(f"a{i}" for i in range(adapters)))
    made: list[Any] = []

    def call() -> None:
        made[:] = [merge(model, text)]

    def delta() -> Any:
        adapter = made[0].adapter
        path = runtime(model).adapters["a0"].paths[0]
        return adapter.at(path, "B") @ adapter.at(path, "A")

    return call, delta


def peft(method: str, dim: int, sites: int, adapters: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The same by peft."""
    import torch
    from peft import LoraConfig, get_peft_model

    suffixes, layers = targets(method, sites)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=suffixes)
    model = get_peft_model(base(dim, layers), config, adapter_name="a0")
    for i in range(1, adapters):
        model.add_adapter(f"a{i}", config)
    sites_found = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "get_delta_weight")]
    for i in range(adapters):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for site in sites_found:
                for part in (site.lora_A, site.lora_B):
                    weight = part[f"a{i}"].weight
                    weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    names = [f"a{i}" for i in range(adapters)]
    options = {} if method == "svd" else {"density": 0.2}

    def call() -> None:
        if "merged" in model.peft_config:
            model.delete_adapter("merged")
        model.add_weighted_adapter(
            names, [1.0] * adapters, "merged", combination_type=PEFT[method], svd_rank=RANK, **options
        )

    return call, lambda: sites_found[0].get_delta_weight("merged")


class Peak:
    """Highest resident set while a block runs, in MB above its start."""

    def __enter__(self) -> Peak:
        import psutil

        self._process = psutil.Process()
        self._start = self._top = self._process.memory_info().rss
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self._top = max(self._top, self._process.memory_info().rss)

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()
        self.mb = (self._top - self._start) / 2**20


def measure(side: str, method: str, dim: int, sites: int, adapters: int) -> dict[str, Any]:
    """Seconds, peak memory, and the energy of the first merged delta (to see that both did the same)."""
    import torch

    call, delta = {"ours": ours, "peft": peft}[side](method, dim, sites, adapters)
    runs = (10 if side == "ours" else 2) if method == "svd" else 1
    if method == "svd" and side == "ours":
        call()  # the first call imports the methods
    seconds, cpu = [], []
    with Peak() as peak:
        for _ in range(runs):
            start = time.perf_counter(), time.process_time()
            call()
            seconds.append(time.perf_counter() - start[0])
            cpu.append(time.process_time() - start[1])
    with torch.no_grad():
        norm = float(delta().norm())
    threads = torch.get_num_threads()
    return {"seconds": min(seconds), "cpu_seconds": min(cpu), "peak_mb": peak.mb, "norm": norm, "threads": threads}


def one(side: str, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure in a fresh process."""
    adapters = 4 if method == "svd" else args.adapters
    command = [sys.executable, __file__, "--one", side, method, str(args.dim), str(args.sites), str(adapters)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print a table, and with --json the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--sites", type=int, default=7, help="rounded down to whole layers of 7")
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--methods", default="svd,ties,ties (paper),dare,dare_ties")
    parser.add_argument("--json", metavar="FILE", help="- for stdout")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        side, method, dim, sites, adapters = args.one
        print(json.dumps(measure(side, method, int(dim), int(sites), int(adapters))))
        return
    rows = []
    for method in args.methods.split(","):
        mine = one("ours", method, args)
        theirs = one("peft", method.split(" ")[0], args)
        sites = 1 if method == "svd" else 7 * max(1, args.sites // 7)
        rows.append({"method": method, "sites": sites, "dim": args.dim, "ours": mine, "peft": theirs})
        ratio, cpu = (theirs[key] / mine[key] for key in ("seconds", "cpu_seconds"))
        print(
            f"{method:14} {sites:4} sites  ours {mine['seconds'] * 1e3:10.1f} ms {mine['peak_mb']:7.0f} MB   "
            f"peft {theirs['seconds'] * 1e3:10.1f} ms {theirs['peak_mb']:7.0f} MB   "
            f"{ratio:7.1f} x ({cpu:.1f} x in CPU time)",
            file=sys.stderr if args.json == "-" else sys.stdout,
        )
    report = {"machine": platform.processor() or platform.machine(), "rows": rows}
    if args.json == "-":
        print(json.dumps(report, indent=1))
    elif args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
