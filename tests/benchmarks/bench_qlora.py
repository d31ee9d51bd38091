"""QLoRA on an nf4 base: this project's loop against peft + bitsandbytes + the transformers Trainer.

    python tests/benchmarks/bench_qlora.py [--width 512] [--layers 6] [--json FILE|-]

The same random Llama, the same rows in the same order, the same initial A, AdamW, clipping at 0.3: so the losses are
the same too, and the report says how far apart. Each side runs in a process of its own, in turn; time is the median
step of its best round in processor seconds, memory the largest resident size above what the process held before the
base (on a GPU: seconds, and what torch allocated at most).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from bench_tools import llama, machine, resident, shape_options

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATE, CLIP = 1e-3, 0.3


def clock() -> float:
    """Processor seconds, which other work on the machine does not change; with a GPU, seconds."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def dataset(given: argparse.Namespace) -> Any:
    """Rows of one length in which tokens repeat, so that there is something to learn."""
    from train.data.batches import Dataset, Ragged

    random = torch.Generator().manual_seed(0)
    starts = torch.randint(4, given.vocabulary // 2, (given.rows * given.steps,), generator=random).tolist()
    ids = [[4 + (s + 7 * i) % (given.vocabulary - 4) for i in range(given.prompt)] for s in starts]
    return Dataset({"input_ids": Ragged.of(ids)}, "causal_lm", pad_id=0)


def ours(folder: Path, given: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Losses and seconds of each step, by train.fit."""
    import compose
    from train.config import TrainConfig
    from train.loop import fit
    from train.method import Method

    marks: list[float] = []

    class Timed(Method):
        def after_step(self, learner: Any, step: int) -> None:
            marks.append(clock())

    run = TrainConfig(
        base=str(folder), quantize="nf4", batch_size=given.rows, duration=given.steps, lr=RATE, clip=CLIP,
        schedule="constant", warmup=0, gradient_checkpointing=given.checkpointing > 0, precision=given.precision,
    )  # fmt: skip
    model = compose.load(str(folder), quantize="nf4", dtype=given.precision)
    options = {"r": given.rank, "lora_alpha": given.rank, "target_modules": "all-linear"}
    adapter = compose.create(model, "lora", options, name="a", seed=0)
    for index, path in enumerate(adapter.paths):
        with torch.no_grad():
            adapter.at(path, "A").copy_(initial(adapter.at(path, "A").shape, index))
    compose.activate(model, "a")
    losses = [record["loss"] for record in fit(model, adapter, dataset(given), None, run, method=Timed()).history]
    return losses, [b - a for a, b in pairwise(marks)]


def peer(folder: Path, given: argparse.Namespace) -> tuple[list[float], list[float]]:
    """The same by peft and the Trainer, as their documentation has it."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

    from train.data.batches import epoch_order

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[given.precision]
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    quantization = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head"], **options)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=dtype)
    model.train()  # before its first forward: in eval mode a CPU's weights are repacked and lose their gradient
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=given.checkpointing > 0)
    model = get_peft_model(
        model, LoraConfig(r=given.rank, lora_alpha=given.rank, target_modules=TARGETS, lora_dropout=0)
    )
    with torch.no_grad():
        factors = [p for name, p in model.named_parameters() if "lora_A" in name]
        for index, parameter in enumerate(factors):
            parameter.copy_(initial(parameter.shape, index))
    data = dataset(given)
    order = epoch_order(data, 0, 0, given.rows)
    rows = [{"input_ids": data.tokens.row(int(i)).long()} for i in order]
    for row in rows:
        row["labels"], row["attention_mask"] = row["input_ids"], torch.ones_like(row["input_ids"])
    marks: list[float] = []

    class Mark(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(clock())

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(rows)

    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=given.rows,
        max_steps=given.steps,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP,
        gradient_checkpointing=given.checkpointing > 0,
        optim="adamw_torch",
        bf16=given.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = InOrder(model, arguments, train_dataset=rows, callbacks=[Mark()])
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return losses, [b - a for a, b in pairwise(marks)]


def initial(shape: Any, index: int) -> torch.Tensor:
    """The same A for both sides."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(index)) / shape[1] ** 0.5


def child(given: argparse.Namespace) -> None:
    """One side, once."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(given.threads or torch.get_num_threads())
    import accelerate
    import bitsandbytes
    import peft
    import transformers

    import compose.api
    import train.loop

    _ = (
        accelerate,
        bitsandbytes,
        peft,
        transformers.Trainer,
        compose.api,
        train.loop,
    )  # their memory counts for neither
    before = resident("VmRSS", reset=True)
    losses, seconds = {"ours": ours, "peer": peer}[given.side](Path(given.folder), given)
    cuda = torch.cuda.is_available()
    memory = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM") - before
    found = {"losses": losses, "step": statistics.median(seconds[1:] or seconds), "memory": memory}
    sys.stdout.write("\n" + json.dumps(found) + "\n")


def main() -> None:
    """Run both sides in turn and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"width": 512, "layers": 6, "vocabulary": 2000, "rank": 16, "rows": 8, "prompt": 64, "steps": 8}
    shape_options(parser, **shape, rounds=2, checkpointing=0)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="what both sides compute in")
    parser.add_argument("--side", choices=["ours", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        child(given)
        return
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as folder:
        llama(given).save_pretrained(folder)
        names = (*shape, "threads", "checkpointing")
        options = [f"--{name}={getattr(given, name)}" for name in (*names, "precision")]
        for _ in range(given.rounds):
            for side, rounds in found.items():
                command = [sys.executable, __file__, *options, f"--side={side}", f"--folder={folder}"]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
                rounds.append(json.loads(done.stdout.strip().splitlines()[-1]))
    step, memory = ({s: min(r[k] for r in rounds) for s, rounds in found.items()} for k in ("step", "memory"))
    pairs = zip(found["ours"][0]["losses"], found["peer"][0]["losses"], strict=True)
    report = {
        "seconds_a_step": step,
        "time_ratio": step["ours"] / step["peer"],
        "memory": memory,
        "memory_ratio": memory["ours"] / memory["peer"],
        "largest_loss_difference": max(abs(a - b) for a, b in pairs),
        "first_and_last_loss": [found["ours"][0]["losses"][i] for i in (0, -1)],
        "machine": machine(),
    }
    if given.json:
        text = json.dumps(report, indent=2) + "\n"
        sys.stdout.write(text) if given.json == "-" else Path(given.json).write_text(text)
    print(
        f"QLoRA step {report['time_ratio']:.2f}x the time and {report['memory_ratio']:.2f}x the memory of peft's; "
        f"losses within {report['largest_loss_difference']:.1e}\n{report['machine']}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
