"""Makes adapterhub.safetensors and the directories beside it, with that library in an environment of its own.

    python -m venv v && v/bin/pip install torch==2.13.0 adapters==1.3.0
    v/bin/python tests/golden/make_adapterhub.py

The library pins an older transformers, so it cannot stand in ours. The base is a two-layer random BERT whose weights
are in base.safetensors; the goldens are its last hidden states with each adapter, at rows of two lengths.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import adapters
import torch
import transformers
from adapters.composition import Stack
from safetensors.torch import save_file

HERE = Path(__file__).parent / "adapterhub"
CONFIG = {
    "vocab_size": 53,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "pad_token_id": 1,
}
PREFIX = adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=8)
ADAPTERS = {
    "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "pfeiffer": adapters.SeqBnConfig(reduction_factor=4),
    "parallel": adapters.ParBnConfig(reduction_factor=2),
    "mam": adapters.MAMConfig(PREFIX, adapters.ParBnConfig(reduction_factor=2)),
    "prefix": PREFIX,
    "flat_prefix": adapters.PrefixTuningConfig(prefix_length=3, flat=True),
    "lora": adapters.LoRAConfig(r=2, alpha=4),
    "ia3": adapters.IA3Config(),
    "second": adapters.DoubleSeqBnConfig(reduction_factor=2),
}


def main() -> None:
    torch.manual_seed(0)
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir(parents=True)
    model = transformers.BertModel(transformers.BertConfig(**CONFIG)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, HERE / "base.safetensors")
    adapters.init(model)
    for name, config in ADAPTERS.items():
        model.add_adapter(name, config=config)
    for name, parameter in model.named_parameters():
        if any(part in ADAPTERS for part in name.split(".")):
            parameter.data.add_(0.3 * torch.randn(parameter.shape))
    ids = torch.randint(4, 53, (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    golden = {"ids": ids, "mask": mask}
    active = {**{name: name for name in ADAPTERS}, "stack": Stack("houlsby", "second")}
    for name, setup in active.items():
        model.set_active_adapters(setup)
        with torch.no_grad():
            golden[name] = model(input_ids=ids, attention_mask=mask).last_hidden_state
    for name in ADAPTERS:
        model.save_adapter(str(HERE / name), name)
        # Its own use_safetensors=True fails for prefixes, whose tensors are shared.
        pickle = HERE / name / "pytorch_adapter.bin"
        tensors = torch.load(pickle, weights_only=True)
        save_file({k: v.clone() for k, v in tensors.items()}, HERE / name / "adapter.safetensors")
        pickle.unlink()
    save_file(golden, HERE / "outputs.safetensors")


if __name__ == "__main__":
    main()
