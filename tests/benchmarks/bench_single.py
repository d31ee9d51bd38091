"""One active adapter of each kind that PEFT has: a forward pass and greedy generation, against PEFT.

    python tests/benchmarks/bench_single.py [--kinds lora,dora,ia3,prefix,prompt] [--quantize none,nf4] [--json FILE|-]

Ratios to the bare base, which runs in turn with both: the median over rounds. ``--width 768 --layers 12`` is the shape
of a 125M model, the default of one of 22M (without embeddings). Both sides hold the same weights, and before anything
is timed their outputs are compared.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from bench_tools import interleave, llama, machine, ratio, report, shape_options
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from compose.base.quantization import keep_differentiable
from compose.formats.directory import read_adapter
from compose.runtime.model_runtime import activate, runtime

CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": lambda: peft.LoraConfig(r=8, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"),
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=16, task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=16, task_type="CAUSAL_LM"),
}


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kinds", default=",".join(CONFIGS))
    parser.add_argument("--quantize", default="none,nf4")
    parser.add_argument("--tokens", type=int, default=16, help="tokens to generate")
    shape_options(parser, rows=4, prompt=64, layers=6, width=384, vocabulary=4096, rounds=9)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        llama(options).save_pretrained(directory)
        rows = [
            row
            for quantize in options.quantize.split(",")
            for kind in options.kinds.split(",")
            for row in measure(kind, quantize, Path(directory), options)
        ]
    columns = ("quantize", "kind", "phase", "base_ms", "ours", "peft", "ours_to_peft")
    report({"machine": machine(), "model": vars(options), "rows": rows}, columns, options.json, sys.stdout)


def measure(kind: str, quantize: str, base: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of both phases for one kind on one base."""
    bare, ours, theirs = (load(base, quantize) for _ in range(3))
    wrapped = peft_model(theirs, kind)
    with tempfile.TemporaryDirectory() as directory:
        wrapped.save_pretrained(directory)
        home = runtime(ours)
        home.add("a", read_adapter(directory, home.sites, ours, name="a"))
    activate(ours, "a")
    ids = torch.randint(options.vocabulary, (options.rows, options.prompt), device=bare.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    length = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens, "do_sample": False}
    models = {"base": bare, "ours": ours, "peft": wrapped}
    rows = []
    with torch.no_grad():
        check(ours(**inputs).logits, wrapped(**inputs).logits)
        for phase in ("forward", "generate"):
            calls = {
                name: (lambda m=m: m(**inputs)) if phase == "forward" else (lambda m=m: m.generate(**inputs, **length))
                for name, m in models.items()
            }
            times = interleave(calls, options.rounds)
            rows.append(
                {
                    "quantize": quantize,
                    "kind": kind,
                    "phase": phase,
                    "base_ms": sorted(times["base"])[options.rounds // 2] * 1e3,
                    "ours": ratio(times["ours"], times["base"]),
                    "peft": ratio(times["peft"], times["base"]),
                    "ours_to_peft": ratio(times["ours"], times["peft"]),
                }
            )
    return rows


def load(base: Path, quantize: str) -> Any:
    """The base, dense or in nf4; for both sides without bitsandbytes' rounded bf16 repacking, where a CPU has it."""
    options = {}
    if quantize == "nf4":
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        options["quantization_config"] = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options).eval().requires_grad_(False)
    keep_differentiable(model)
    return model


def peft_model(base: Any, kind: str) -> Any:
    """PEFT's model with random weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(base, CONFIGS[kind]())
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            kept = parameter.data if "ia3" in name or "magnitude" in name else 0.0
            parameter.data = kept + 0.02 * torch.randn_like(parameter)
    return wrapped.eval()


def check(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Both compute the same thing; otherwise there is nothing to compare."""
    theirs = theirs[:, -ours.shape[1] :]
    worst, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
    if worst > 1e-3 * scale:
        raise SystemExit(f"ours and PEFT's logits differ by {worst:g} of {scale:g}: nothing to compare")


if __name__ == "__main__":
    main()
