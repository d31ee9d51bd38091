"""A model small enough to reason about, data for it, and the built-in base's tokenizer."""

from __future__ import annotations

import json
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compose
from train.config import TrainConfig
from train.data.batches import Dataset, Ragged

VOCABULARY = 23


class ToyLM(nn.Module):
    """A frozen bag-of-last-token language model with room for an adapter: logits (B, T, V)."""

    def __init__(self, adapter: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(7)
        self.embed = nn.Parameter(torch.randn(VOCABULARY, 16, generator=random), requires_grad=False)
        self.head = nn.Parameter(torch.randn(VOCABULARY, 16, generator=random) * 0.1, requires_grad=False)
        self.drop = nn.Dropout(dropout)
        self.adapter = adapter
        self.forwards = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        self.forwards += 1
        hidden = self.adapter(self.drop(self.embed[input_ids]))
        return types.SimpleNamespace(logits=hidden @ self.head.T)


class ToyAdapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(3)
        self.down = nn.Parameter(torch.randn(16, 4, generator=random) * 0.3)
        self.up = nn.Parameter(torch.zeros(4, 16))
        self.gain = nn.Parameter(torch.ones(16))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.gain * (hidden + hidden @ self.down @ self.up)


@pytest.fixture
def toy():
    """A fresh (model, adapter) at the same initial values each time."""

    def make(dropout: float = 0.0) -> tuple[ToyLM, ToyAdapter]:
        adapter = ToyAdapter()
        return ToyLM(adapter, dropout).eval(), adapter

    return make


@pytest.fixture
def ragged_lm():
    """Language-modelling rows of unequal length in which the next token follows from the last one."""

    def make(rows: int = 50, seed: int = 0, shortest: int = 3, longest: int = 12) -> Dataset:
        random = torch.Generator().manual_seed(seed)
        lengths = torch.randint(shortest, longest + 1, (rows,), generator=random).tolist()
        starts = torch.randint(0, VOCABULARY, (rows,), generator=random).tolist()
        ids = [[(start + 3 * i) % VOCABULARY for i in range(n)] for start, n in zip(starts, lengths, strict=True)]
        return Dataset({"input_ids": Ragged.of(ids)}, "causal_lm", source="toy")

    return make


@pytest.fixture
def config():
    """A TrainConfig with test-sized defaults."""

    def make(**changes: Any) -> TrainConfig:
        values = {"batch_size": 8, "duration": 12, "lr": 0.02, "schedule": "constant", "warmup": 0.0, **changes}
        return TrainConfig(**values)

    return make


@pytest.fixture(scope="session")
def tokenizer():
    return compose.tokenizer("builtin:tiny-lm")


WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "good",
    "bad",
    "fine",
    "poor",
    "a",
    "film",
    "plot",
    "very",
    "the",
)


def word_tokenizer(single, pair, **names):
    """A tokenizer whose vocabulary is WORDS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", **names)


@pytest.fixture(scope="session")
def t5_base(tmp_path_factory):
    """A directory with a tiny random T5 and a word tokenizer."""
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 3}
    T5ForConditionalGeneration(T5Config(vocab_size=len(WORDS), **sizes, **ids)).save_pretrained(folder)
    inputs = ["input_ids", "attention_mask"]
    tokenizer = word_tokenizer("$A [SEP]", "$A [SEP] $B [SEP]", eos_token="[SEP]", model_input_names=inputs)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def bert_base(tmp_path_factory):
    """A directory with a tiny random BERT encoder (no pooler, no head) and a word tokenizer."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape = BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, pad_token_id=0, **sizes)
    BertModel(shape, add_pooling_layer=False).save_pretrained(folder)
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = word_tokenizer("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", model_input_names=inputs, **names)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def reviews(tmp_path):
    """A jsonl file whose label is decided by one word."""

    def make(rows: int = 48, **extra: Any) -> str:
        lines = []
        for i in range(rows):
            word = ("good", "bad", "fine", "poor")[i % 4]
            text = f"{'the ' * (i % 5)}{'very ' * (i % 3)}{word} film"
            lines.append({"text": text, "label": "pos" if i % 2 == 0 else "neg", **extra})
        path = tmp_path / "reviews.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(path)

    return make


@pytest.fixture
def notes(tmp_path):
    """A text file for language modelling."""
    path = tmp_path / "notes.txt"
    path.write_text(
        "".join(f"Note {i}: the adapter of site {i % 7} is loaded, then it is active.\n" for i in range(60))
    )
    return str(path)


@pytest.fixture
def interrupt():
    """What watches a run and is Ctrl-C after a step: the run leaves its last checkpoint and no end."""

    def after(step):
        def watch(record):
            if record["step"] > step:
                raise KeyboardInterrupt

        return watch

    return after


@pytest.fixture
def data():
    """Rows in which each token follows from the last: 3 steps up in a vocabulary of 53 (4 and up)."""

    def make(seed: int, rows: int = 24) -> Dataset:
        random = torch.Generator().manual_seed(seed)
        lengths = torch.randint(5, 14, (rows,), generator=random).tolist()
        starts = torch.randint(0, 49, (rows,), generator=random).tolist()
        ids = [[4 + (s + 3 * i) % 49 for i in range(n)] for s, n in zip(starts, lengths, strict=True)]
        return Dataset({"input_ids": Ragged.of(ids)}, "causal_lm", pad_id=1)

    return make
