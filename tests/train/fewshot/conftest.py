"""A tiny masked LM with a word tokenizer, a tiny T5, and reviews whose label is decided by one word."""

from __future__ import annotations

import json

import pytest
import torch

import compose
from train.fewshot.examples import Example
from train.fewshot.job import Job

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PLAIN = "it was . , ! ? : is this great terrible good bad fine poor awful a film plot very the one two three".split()  # noqa: SIM905
WORDS = (*SPECIAL, *PLAIN, *(f"w{i}" for i in range(20)))


def _tokenizer(words, special, post=True):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=special["unk_token"]))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if post:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return made


@pytest.fixture(scope="session")
def masked_base(tmp_path_factory):
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("masked")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = BertForMaskedLM(BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, pad_token_id=0, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    made = _tokenizer(WORDS, names)
    PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=inputs, **names).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def masked_tokenizer(masked_base):
    return compose.tokenizer(masked_base)


@pytest.fixture(scope="session")
def tiny_t5():
    """A T5 of random weights, trained for nothing: (model, tokenizer with three sentinels)."""
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    special = ("<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_1>", "<extra_id_2>")
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = (*special, *PLAIN)
    extra = list(special[3:])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(words, names, post=False), additional_special_tokens=extra, **names
    )
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=len(words),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval(), tokenizer


@pytest.fixture
def reviews_of():
    """`n` different labelled examples: good and fine are `pos`, bad and poor are `neg`."""

    def make(n: int = 16, start: int = 0) -> list[Example]:
        rows = []
        for i in range(start, start + n):
            word = ("good", "bad", "fine", "poor")[i % 4]
            text = f"the {word} w{i % 20} film w{(i // 20) % 20}"
            rows.append(Example(text, None, "pos" if i % 2 == 0 else "neg"))
        return rows

    return make


@pytest.fixture
def make_job(masked_base, masked_tokenizer, reviews_of):
    def make(**changes) -> Job:
        import warnings

        from train.fewshot.classifier.classifier import load_base

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = load_base(masked_base)
        facts = {
            "examples": tuple(reviews_of(8)),
            "labels": ("neg", "pos"),
            "words": {"pos": ("great",), "neg": ("terrible",)},
            "budget": 1000.0,
            "max_length": 32,
        }
        facts |= {"base": masked_base, "model": model, "tokenizer": masked_tokenizer}
        return Job(**{**facts, **changes})

    return make


@pytest.fixture
def review_file(tmp_path, reviews_of):
    def make(n: int = 40, start: int = 0, name: str = "reviews.jsonl", **extra) -> str:
        path = tmp_path / name
        rows = [{"text": e.text, "label": e.label, **extra} for e in reviews_of(n, start)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return make
