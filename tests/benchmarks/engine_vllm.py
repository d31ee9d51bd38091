"""vLLM's part of bench_engine.py, for a Python that has vLLM: ``engine_vllm.py ASKED.json TOLD.json``.

Answers each load of rows and writes the processor seconds that each took, model and adapters loaded before.
"""

import json
import sys
import time
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main() -> None:
    """Measure what the first file asks for."""
    asked = json.loads(Path(sys.argv[1]).read_text())
    told = {}
    for with_adapters in (False, True):  # the bare base without room for adapters, as that costs
        loads = [(i, load) for i, load in enumerate(asked["loads"]) if bool(load["adapters"]) == with_adapters]
        if not loads:
            continue
        most = max(load["adapters"] for _, load in loads)
        lora = {"enable_lora": True, "max_loras": most, "max_cpu_loras": most, "max_lora_rank": asked["rank"]}
        llm = LLM(
            model=asked["base"],
            dtype=asked["dtype"],
            max_model_len=max(asked["longest"], 256),
            max_num_seqs=asked["rows"],
            enforce_eager=True,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **(lora if with_adapters else {}),
        )
        adapters = {name: LoRARequest(name, i + 1, path) for i, (name, path) in enumerate(asked["adapters"].items())}
        for i, load in loads:
            answer(llm, [dict(row, tokens=2, at=0.0) for row in load["rows"][: asked["rows"]]], adapters)
            told[i] = answer(llm, load["rows"], adapters)
        del llm
    Path(sys.argv[2]).write_text(json.dumps([told[i] for i in range(len(told))]))


def answer(llm: LLM, rows: list[dict], adapters: dict) -> float:
    """Processor seconds in which all rows are answered, each added once so many have passed or nothing is left."""
    engine, waiting, began = llm.llm_engine, list(enumerate(rows)), time.process_time()
    while waiting or engine.has_unfinished_requests():
        while waiting and (time.process_time() - began >= waiting[0][1]["at"] or not engine.has_unfinished_requests()):
            number, row = waiting.pop(0)
            sampling = SamplingParams(temperature=0.0, max_tokens=row["tokens"], ignore_eos=True, detokenize=False)
            prompt = {"prompt_token_ids": row["ids"]}
            engine.add_request(f"{number}", prompt, sampling, lora_request=adapters.get(row["adapter"]))
        engine.step()
    return time.process_time() - began


if __name__ == "__main__":
    main()
