"""The tasks beside language modelling and classification, from rows to a published adapter; packing and chats."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

import compose
import train
from compose.artifacts import probes
from train.config import TrainConfig
from train.data.batches import IGNORE
from train.data.datasets import completions, encode, load_splits, read_rows
from train.data.encoders import chats, packed
from train.errors import DataError
from train.loop import fit
from train.pipeline import run
from train.steps.evaluate import evaluate
from train.steps.objective import forward, loss_sum

TAGS = {"good": "POS", "fine": "POS", "bad": "NEG", "poor": "NEG"}
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def short(base, train, **changes):
    values = {"base": base, "data": {"train": train, "eval": 0.25}, "max_length": 16, "batch_size": 8, "lr": 2e-2}
    return TrainConfig(**{**values, "duration": "20 epochs", "eval_every": "5 epochs", **changes})


def sentences(rows):
    words = ("good", "bad", "fine", "poor")
    return [[*(["the", "very", "a"] * 2)[: i % 5], words[i % 4], "film", words[(i // 4) % 4]] for i in range(rows)]


def test_tokens_are_tagged(bert_base, tmp_path):
    rows = [{"tokens": words, "tags": [TAGS.get(w, "O") for w in words]} for words in sentences(48)]
    out = run(
        short(bert_base, write(tmp_path / "t.jsonl", rows), task="token_classification"),
        folder=tmp_path / "r",
        ref="me/t",
    )
    assert out.result.best["accuracy"] > 0.99
    assert out.artifact.manifest.labels == ("NEG", "O", "POS")
    assert out.artifact.manifest.task == "token_classification"
    model = compose.load(bert_base, "me/t@0.1.0")
    ids = compose.tokenizer(bert_base)("the good film", return_tensors="pt")
    with torch.no_grad():
        assert model(**ids).logits.argmax(-1)[0].tolist()[1:4] == [1, 2, 1]


def test_only_the_first_piece_of_a_word_has_a_tag(tokenizer):
    config = TrainConfig(task="token_classification")
    rows = [{"tokens": ["internationalization", "is"], "tags": ["LONG", "O"]}]
    data = encode(rows, config, tokenizer, source="rows")
    labels = data.batch(torch.tensor([0]))["labels"][0].tolist()
    assert len(labels) > 3
    assert [i for i, label in enumerate(labels) if label != IGNORE] == [0, len(labels) - 1]
    for bad, said in (
        ({"tokens": ["a"], "tags": ["O", "O"]}, "row 2: tokens and tags are not two lists of the same length"),
        ({"tokens": ["a"], "tags": ["NEW"]}, "row 2: tags unseen in training: NEW"),
    ):
        with pytest.raises(DataError, match=said):
            encode([*rows, bad], config, tokenizer, labels=("LONG", "O"), source="rows")


def test_numbers_are_fitted(bert_base, tmp_path):
    rows = [{"text": " ".join(words), "label": sum(w in ("good", "fine") for w in words)} for words in sentences(48)]
    config = short(bert_base, write(tmp_path / "n.jsonl", rows), task="regression", metric="pearson")
    out = run(config, folder=tmp_path / "r", ref="me/n")
    assert out.result.best["pearson"] > 0.9
    assert out.result.best["spearman"] > 0.8
    assert out.result.best["loss"] < 0.3
    with pytest.raises(DataError, match=r"row 2: the label 'many' is not a finite number"):
        encode([rows[0], {"text": "a film", "label": "many"}], config, compose.tokenizer(bert_base), source="rows")


def test_an_encoder_decoder_learns_to_answer(tiny, tokenizer, config):
    """Its loss is transformers' own, and it learns."""
    rows = [{"prompt": f"{'ab' * (i % 3 + 1)}", "completion": "c" * (i % 3 + 1)} for i in range(24)]
    data = encode(rows, TrainConfig(task="seq2seq"), tokenizer, source="rows")
    model = tiny.model("t5", vocab_size=len(tokenizer), dropout_rate=0.0, decoder_start_token_id=0)
    batch = data.batch(torch.arange(6))
    ours = loss_sum("seq2seq", forward(model, batch, "seq2seq"), batch["labels"]) / data.items[:6].sum()
    assert ours.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    adapter = compose.create(model, "lora", {"r": 4, "target_modules": "all-linear"}, name="a")
    compose.activate(model, "a")
    before = evaluate(model, data)["loss"]
    fit(model, adapter, data, None, config(task="seq2seq", duration=30, lr=0.02))
    assert evaluate(model, data)["loss"] < before - 0.5


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("seq2seq", lambda word, tag: {"prompt": f"the {word} film", "completion": "plot" if tag == "POS" else "a"}),
        ("classification", lambda word, tag: {"text": f"the {word} film", "label": tag}),
    ],
)
def test_an_encoder_decoder_from_its_files_to_a_published_adapter(t5_base, tmp_path, recwarn, task, row):
    file = write(tmp_path / "rows.jsonl", [row(*pair) for pair in TAGS.items()] * 8)
    config = short(t5_base, file, task=task, options={"r": 4, "target_modules": "all-linear"})
    out = run(TrainConfig(**{**dict(config), "data": {"train": file, "eval": file}}), folder=tmp_path / "r", ref="me/t")
    losses = [r["loss"] for r in out.result.history if "loss" in r]
    assert losses[-1] < 0.5 * losses[0]
    found = train.evaluate("me/t", file, base=t5_base, max_length=16)
    assert found["measures"]["loss"] == pytest.approx(out.result.best["loss"], rel=1e-4)
    assert not [w for w in recwarn if "drawn with seed 0" in str(w.message)]  # the head is the adapter's
    assert probes.check("me/t", base=t5_base).same


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_packed_rows_do_not_see_each_other(tiny, tokenizer, family):
    prompts = [f"Question {i}: {'why ' * (i % 7)}" for i in range(12)]
    data = completions(tokenizer, prompts, [f"because of {i}." for i in range(12)], 48)
    together = packed(data, 48)
    assert len(together) < len(data) / 1.4
    assert int(together.items.sum()) == int(data.items.sum())
    model = tiny.model(family, vocab_size=len(tokenizer))

    def loss(rows):
        batch = rows.batch(torch.arange(len(rows)))
        return loss_sum("causal_lm", forward(model, batch, "causal_lm"), batch["labels"])

    torch.testing.assert_close(loss(together), loss(data), rtol=1e-5, atol=1e-4)


def test_packing_is_an_option_of_the_data(tmp_path):
    rows = [{"prompt": f"Say {i}:", "completion": f" it is {i}"} for i in range(40)]
    file = write(tmp_path / "p.jsonl", rows)
    values = {"max_length": 64, "batch_size": 2, "duration": 3}
    out = run(TrainConfig(data={"train": file, "packing": True}, **values), folder=tmp_path / "a", ref="me/a")
    plain = run(TrainConfig(data={"train": file}, **values), folder=tmp_path / "b", ref="me/b")
    assert out.result.items > 2 * plain.result.items
    with pytest.raises(DataError, match="prompt"):
        config = TrainConfig(data={"train": file, "packing": True}, method="prompt", **values)
        run(config, folder=tmp_path / "c", ref="me/c")


def test_only_what_the_assistant_says_is_learned(tokenizer, tmp_path):
    tokenizer.chat_template = CHAT
    try:
        talk = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello there"},
            {"role": "user", "content": "Name?"},
            {"role": "assistant", "content": "Ada"},
        ]
        data, cut = chats(tokenizer, [talk], 128)
        labels = data.batch(torch.tensor([0]))["labels"][0]
        learned = tokenizer.decode(labels[labels != IGNORE])
        assert learned == "Hello there\nAda\n"
        assert cut == 0
        file = write(tmp_path / "chat.jsonl", [{"talk": talk}] * 3)
        config = TrainConfig(data={"train": file, "packing": True}, columns={"messages": "talk"}, max_length=128)
        laid = load_splits(config, tokenizer).train
        assert (len(laid), int(laid.items.sum())) == (1, 3 * int(data.items.sum()))
        with pytest.raises(DataError, match="row 1: a message is not a role and a content"):
            chats(tokenizer, [[{"role": "user"}]], 128)
    finally:
        tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        chats(tokenizer, [talk], 128)


def test_a_data_set_of_the_datasets_library(tmp_path):
    pytest.importorskip("datasets")
    write(tmp_path / "train.jsonl", [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}])
    assert read_rows(f"hf:{tmp_path}:train") == [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(f"hf:{tmp_path}:nosplit")


def test_the_loss_of_a_padded_batch_counts_each_item_once():
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, IGNORE, 2], [IGNORE, 0, IGNORE]])
    rows = [(0, 0), (0, 2), (1, 1)]
    expected = sum(F.cross_entropy(logits[i, j], labels[i, j]) for i, j in rows)
    torch.testing.assert_close(loss_sum("token_classification", logits, labels), expected)
