from __future__ import annotations

import json

import pytest
import torch

from train.config import TrainConfig
from train.data.batches import IGNORE, Dataset, Ragged, epoch_order
from train.data.datasets import check, completions, labelled, load_splits, read_rows, text_blocks
from train.data.encoders import chats
from train.data.files import file_digests
from train.errors import DataError

ROWS = [{"text": f"text number {i}", "label": i % 2} for i in range(10)]


def write_jsonl(path, rows=ROWS):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


# -- files ---------------------------------------------------------------------------------------------------------


def test_every_format_reads_the_same_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    from pyarrow import parquet

    write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    lines = [f'"{row["text"]}",{row["label"]}' for row in ROWS]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *lines]))
    (tmp_path / "a.tsv").write_text("\n".join(["text,label", *lines]).replace(",", "\t"))
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet"):
        rows = read_rows(tmp_path / name)
        assert [(row["text"], int(row["label"])) for row in rows] == [(r["text"], r["label"]) for r in ROWS], name


def test_a_folder_of_texts_is_one_row_a_file_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in (("b.md", "bee"), ("a.txt", "eh"), ("sub/c.py", "see"), (".hidden", "no")):
        (tmp_path / name).write_text(text)
    assert [row["text"] for row in read_rows(tmp_path)] == ["eh", "bee", "see"]
    digests = file_digests(tmp_path)
    assert sorted(digests) == ["a.txt", "b.md", "sub/c.py"]
    assert all(digest.startswith("sha256:") and len(digest) == 71 for digest in digests.values())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n", "is empty"),
        ("a.txt", b"abc\0def", "NUL byte at offset 3"),
        ("a.txt", b"caf\xe9", "byte 0xe9 at offset 3"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2: not JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "line 2: a JSON list"),
        ("a.json", b'{"a": 1}', "not a JSON array"),
        ("a.csv", b"a,b\n1,2\n3\n", "line 3: not 2 cells"),
        ("a.csv", b"a,b\n1,2,3\n", "line 2: not 2 cells"),
        ("a.csv", b"a,b\n", "holds no rows"),
        ("a.parquet", b"PAR1 nonsense", "not a readable parquet"),
    ],
)
def test_each_bad_file_is_named_with_its_place(tmp_path, name, content, said):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert said in str(caught.value)
    assert name in str(caught.value)


def test_missing_files_and_empty_folders(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match="folder without files"):
        read_rows(tmp_path)


# -- encoding ------------------------------------------------------------------------------------------------------


def test_blocks_keep_every_token_of_every_text_in_order(tokenizer):
    texts = ["First text, of some words.", "", "Second text.", "x"]
    data = text_blocks(tokenizer, texts, 8)
    expected = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    tokens = [int(t) for row in range(len(data)) for t in data.tokens.row(row)]
    assert tokens == expected[: len(tokens)]
    assert len(expected) - len(tokens) <= 1
    assert data.lengths[:-1].eq(8).all()
    assert 2 <= data.lengths[-1] <= 8
    assert data.items.sum() == len(tokens) - len(data)


@pytest.mark.parametrize("texts", [[], [""], ["  \n"]])
def test_no_text_is_an_error(tokenizer, texts):
    with pytest.raises(DataError, match="no text"):
        text_blocks(tokenizer, texts, 8)


def test_only_completions_are_learned(tokenizer):
    data = completions(tokenizer, ["The capital of France is", "2 + 2 ="], [" Paris.", " 4"], 64)
    batch = data.batch(torch.tensor([0, 1]))
    for row, (prompt, answer) in enumerate([("The capital of France is", " Paris."), ("2 + 2 =", " 4")]):
        learned = batch["labels"][row] != IGNORE
        assert tokenizer.decode(batch["input_ids"][row][learned]) == answer + tokenizer.eos_token
        assert int(learned.nonzero()[0]) == len(tokenizer(prompt)["input_ids"])
        assert int(data.items[row]) == int(learned.sum())


def test_a_prompt_that_fills_the_row_is_an_error_naming_the_rows(tokenizer):
    with pytest.raises(DataError, match=r"1 of 2 rows: row 2 of") as caught:
        completions(tokenizer, ["short", "long " * 50], ["a", "b"], 16)
    assert "max_length" in caught.value.hint


def test_all_masked_and_empty_data_are_errors():
    ids = Ragged.of([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(DataError, match="masked in 2 of 2 rows"):
        check(Dataset({"input_ids": ids, "labels": Ragged.of([[IGNORE] * 3] * 2)}, "causal_lm"))
    with pytest.raises(DataError, match="masked in 1 of 2 rows"):
        # a label on the first token alone has no position that predicts it
        check(Dataset({"input_ids": ids, "labels": Ragged.of([[1, IGNORE, IGNORE], [4, 5, 6]])}, "causal_lm"))
    with pytest.raises(DataError, match="no rows"):
        check(Dataset({"input_ids": Ragged.of([])}, "causal_lm"))


def test_labels_are_ordered_by_value_and_unseen_ones_refused(tokenizer):
    data = labelled(tokenizer, ["a", "b", "c"], None, [10, 2, 10], 16)
    assert data.labels == ("2", "10")
    assert data.columns["labels"].tolist() == [1, 0, 1]
    with pytest.raises(DataError, match=r"unseen in training: 3 \(first at row 2"):
        labelled(tokenizer, ["a", "b"], None, [10, 3], 16, labels=data.labels)
    with pytest.raises(DataError, match="at least two"):
        labelled(tokenizer, ["a", "b"], None, ["x", "x"], 16)


def test_pairs_are_joined_as_the_tokenizer_joins_them(tokenizer):
    data = labelled(tokenizer, ["first"], ["second"], ["a"], 16, labels=["a", "b"])
    assert data.tokens.row(0).tolist() == tokenizer("first", "second")["input_ids"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "classification", "columns": {"label": "lable"}}, "no column 'lable'; it has: label, text"),
        ({"columns": {"text": "body"}}, "no column 'body'; it has: label, text"),
        ({"columns": {"prompt": "text", "completion": "answer"}}, "no column 'answer'"),
        ({"data": {"train": "FILE", "eval": 0.99}}, "all 10 rows would be held out"),
    ],
)
def test_missing_columns_are_named_with_those_present(tmp_path, tokenizer, changes, said):
    path = write_jsonl(tmp_path / "a.jsonl")
    held = {"data": {**changes["data"], "train": str(path)}} if "data" in changes else {}
    with pytest.raises(DataError) as caught:
        load_splits(TrainConfig(**{"data": {"train": str(path)}, **changes, **held}), tokenizer)
    assert said in str(caught.value)


def test_a_null_cell_is_named_by_its_row(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": None}])
    with pytest.raises(DataError, match="row 2: 'label' is empty"):
        load_splits(TrainConfig(task="classification", data={"train": str(path)}), tokenizer)


def test_held_out_rows_are_drawn_by_seed_and_duplicates_never_straddle(tmp_path, tokenizer):
    rows = [{"text": f"text {i % 30}", "label": i % 2} for i in range(60)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    base = {"task": "classification", "data": {"train": str(path), "eval": 0.2}, "max_length": 16}

    def parts(seed):
        splits = load_splits(TrainConfig(**base, seed=seed), tokenizer)
        return [[tuple(d.tokens.row(i).tolist()) for i in range(len(d))] for d in (splits.train, splits.eval)]

    train, held = parts(0)
    assert len(train) + len(held) == 60
    assert len(held) == 12
    assert not set(train) & set(held)
    assert parts(0) == [train, held]
    assert parts(1)[1] != held


@pytest.mark.parametrize("task", ["classification", "token_classification"])
def test_every_class_keeps_a_row_to_learn_from(tmp_path, tokenizer, task):
    names = [f"rare {i}" for i in range(6)] + ["usual"] * 14
    rows = [{"text": f"text {i}", "label": name, "tokens": ["text"], "tags": [name]} for i, name in enumerate(names)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    for seed in range(5):
        config = TrainConfig(task=task, data={"train": str(path), "eval": 0.3}, max_length=16, seed=seed)
        splits = load_splits(config, tokenizer)
        assert len(splits.eval) == 6
        assert set(splits.train.labels) == set(names)


def test_one_long_document_is_held_out_by_blocks(tmp_path, tokenizer):
    path = tmp_path / "book.txt"
    path.write_text("\n".join(f"Sentence number {i} of the book." for i in range(200)))
    splits = load_splits(TrainConfig(data={"train": str(path), "eval": 0.1}, max_length=32), tokenizer)
    assert len(splits.eval) == round(0.1 * (len(splits.train) + len(splits.eval)))


# -- what is measured on is not trained on -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "trained", "measured"),
    [
        (("train.jsonl", "test.jsonl"), ["train.jsonl"], ["test.jsonl"]),
        (("train.jsonl", "dev.jsonl", "test.jsonl"), ["train.jsonl"], ["dev.jsonl"]),
        (("a/data-train-0.csv", "a/data-valid-0.csv", "extra.csv"), ["a/data-train-0.csv", "extra.csv"], None),
        (("train/0.jsonl", "validation/0.jsonl", "test/0.jsonl"), ["train/0.jsonl"], ["validation/0.jsonl"]),
        (("wiki.train.txt", "wiki.valid.txt"), ["wiki.train.txt"], ["wiki.valid.txt"]),
        (("rows.jsonl", "rows_test.jsonl"), ["rows.jsonl"], ["rows_test.jsonl"]),
        (("an essay.md", "how to test.md"), ["an essay.md", "how to test.md"], ["an essay.md", "how to test.md"]),
    ],
)
def test_files_to_measure_on_are_left_out_of_a_folder_to_train_on(tmp_path, caplog, files, trained, measured):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        kind = name.rpartition(".")[2]
        (tmp_path / name).write_text({"jsonl": json.dumps({"text": name}), "csv": f"text\n{name}"}.get(kind, name))
    assert [row["text"] for row in read_rows(tmp_path, part="train")] == trained
    assert sorted(file_digests(tmp_path, part="train")) == trained
    assert all(name in caplog.text for name in files if name not in trained)
    if measured:
        assert [row["text"] for row in read_rows(tmp_path, part="eval")] == measured
    assert [row["text"] for row in read_rows(tmp_path)] == sorted(files)


def test_a_file_that_data_eval_names_is_left_out_of_the_folder_around_it(tmp_path, tokenizer, caplog):
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.txt").write_text(f"What stands in {name}. " * 9)
    held = {"train": str(tmp_path), "eval": str(tmp_path / "two.txt")}
    splits = load_splits(TrainConfig(data=held, max_length=16), tokenizer)
    assert set(splits.digests) == {"one.txt", "three.txt", "eval/two.txt"}
    assert "two.txt left out" in caplog.text
    with pytest.raises(DataError, match="every file is held out"):
        load_splits(TrainConfig(data={"train": str(tmp_path), "eval": str(tmp_path.parent)}), tokenizer)


def test_rows_in_both_splits_are_counted_and_told(tmp_path, tokenizer, caplog):
    train = write_jsonl(tmp_path / "a.jsonl")
    other = [{"text": "Text  Number 3", "label": 0}, {"text": "text number 4", "label": 1}, {"text": "new", "label": 1}]
    held = write_jsonl(tmp_path / "b.jsonl", other)
    config = TrainConfig(task="classification", data={"train": str(train), "eval": str(held)})
    assert load_splits(config, tokenizer).shared == 2
    assert "2 of 3 held-out rows are also training rows" in caplog.text
    same = TrainConfig(data={"train": str(train), "eval": str(train)})
    assert load_splits(same, tokenizer).shared == len(ROWS)


def test_rows_that_say_the_same_never_straddle_a_held_out_fraction(tmp_path, tokenizer):
    rows = [{"id": i, "text": f"text {i % 10}", "label": i % 2} for i in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    splits = load_splits(TrainConfig(task="classification", data={"train": str(path), "eval": 0.3}), tokenizer)
    train, held = ({tuple(d.tokens.row(i).tolist()) for i in range(len(d))} for d in (splits.train, splits.eval))
    assert held and not train & held


# -- what a cell is -------------------------------------------------------------------------------------------------

TURNS = [{"role": "user", "content": "Hi"}]
LM, SEQ, CLS = "causal_lm", "seq2seq", "classification"


@pytest.mark.parametrize(
    ("task", "row", "said", "hint"),
    [
        (LM, {"text": ["a", "b"]}, "'text' is a list, not text", "one text"),
        (LM, {"text": {"a": 1}}, "'text' is an object, not text", "one text"),
        (LM, {"text": True}, "'text' is true or false, not text", "one text"),
        (LM, {"text": float("nan")}, "'text' is NaN, not text", "one text"),
        (LM, {"prompt": TURNS, "completion": TURNS}, "'prompt' is a list, not text", "columns.messages"),
        (SEQ, {"prompt": "a", "completion": ["b"]}, "'completion' is a list, not text", "one text"),
        (CLS, {"text": "a", "label": ["x", "y"]}, "'label' is a list, not one label", "one label a row"),
        (CLS, {"text": "a", "label": float("nan")}, "'label' is NaN, not one label", "one label a row"),
        (CLS, {"text": "a", "label": 0.5}, "'label' is a fraction, not one label", "task=regression"),
        ("regression", {"text": "a", "label": True}, "the label True is not a finite number", "task=classification"),
        ("token_classification", {"tokens": "a b", "tags": ["X", "Y"]}, "'tokens' is a str, not a list", "a word"),
        ("token_classification", {"tokens": ["a"], "tags": [["X"]]}, "'tags' is a list, not one label", "one label"),
        (LM, {"conversations": TURNS}, "no column 'text'", "ShareGPT"),
        (LM, {"instruction": "a", "output": "b"}, "no column 'text'", "columns.prompt=instruction"),
    ],
)
def test_a_cell_that_is_not_what_its_column_is_for_is_refused(tmp_path, tokenizer, task, row, said, hint):
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError) as caught:
        load_splits(TrainConfig(task=task, data={"train": str(path)}), tokenizer)
    assert f"row 1: {said}" in str(caught.value)
    assert hint in caught.value.hint


def test_one_and_one_point_nought_are_one_class(tmp_path, tokenizer):
    labels = [1, 1.0, 0, 0.0, "0", True, "²", "--1"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": label} for label in labels])
    data = load_splits(TrainConfig(task="classification", data={"train": str(path)}), tokenizer).train
    assert data.labels == ("0", "1", "--1", "true", "²")


def test_weights_of_turns_and_tools_are_heeded_or_refused(tokenizer, caplog):
    said = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    said += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    turns = [("user", "Hi", 1), ("assistant", "Hello", 0), ("user", "Name?", 0), ("assistant", "Ada", 1)]
    talk = [{"role": role, "content": text, "weight": weight, "id": 3} for role, text, weight in turns]
    tokenizer.chat_template = said
    try:
        data, _ = chats(tokenizer, [talk], 128)
        labels = data.batch(torch.tensor([0]))["labels"][0]
        assert tokenizer.decode(labels[labels != IGNORE]) == "Ada\n"
        assert "leaves out of messages: id" in caplog.text
        with pytest.raises(DataError, match="says nothing of tools"):
            chats(tokenizer, [talk], 128, tools=[[{"name": "clock"}]])
        for wrong in ({"weight": 0.5}, {"content": None}, {"content": [{"type": "text", "text": "Hi"}]}):
            with pytest.raises(DataError, match="row 1: "):
                chats(tokenizer, [[{**talk[0], **wrong}]], 128)
        tokenizer.chat_template = said + "{{ tools | length if tools else '' }}{{ raise_exception('no more') }}"
        with pytest.raises(DataError, match="row 1: the chat template refuses the conversation: no more"):
            chats(tokenizer, [talk], 128, tools=[[{"name": "clock"}]])
    finally:
        tokenizer.chat_template = None


# -- batches and order ---------------------------------------------------------------------------------------------


def test_a_batch_holds_the_rows_and_masks_the_rest(ragged_lm):
    data = ragged_lm(9)
    rows = torch.tensor([4, 0, 7])
    batch = data.batch(rows)
    for i, row in enumerate(rows.tolist()):
        real = batch["attention_mask"][i].bool()
        assert batch["input_ids"][i][real].tolist() == data.tokens.row(row).tolist()
        assert batch["labels"][i][real].tolist() == data.tokens.row(row).tolist()
        assert (batch["labels"][i][~real] == IGNORE).all()
    assert int((batch["labels"][:, 1:] != IGNORE).sum()) == int(data.items[rows].sum())


def test_select_keeps_rows_and_their_numbers(ragged_lm):
    data = ragged_lm(9)
    part = data.select(torch.tensor([8, 2]))
    assert part.tokens.row(0).tolist() == data.tokens.row(8).tolist()
    assert part.tokens.row(1).tolist() == data.tokens.row(2).tolist()
    assert part.where(torch.tensor([0, 1])) == "rows 9, 3 of toy"
    assert part.digest != data.digest
    assert part.digest == data.select(torch.tensor([8, 2])).digest


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 64, 333])
def test_an_epoch_is_a_permutation_by_seed_and_epoch(ragged_lm, rows, grouped):
    data = ragged_lm(rows)
    order = epoch_order(data, 0, 0, 8, group_by_length=grouped)
    assert sorted(order.tolist()) == list(range(rows))
    assert order.equal(epoch_order(data, 0, 0, 8, group_by_length=grouped))
    if rows > 7:
        assert not order.equal(epoch_order(data, 0, 1, 8, group_by_length=grouped))
        assert not order.equal(epoch_order(data, 1, 0, 8, group_by_length=grouped))


def test_grouping_by_length_pads_less(ragged_lm):
    data = ragged_lm(400, longest=60)

    def padded(grouped):
        order = epoch_order(data, 0, 0, 8, group_by_length=grouped)
        return sum(int(data.lengths[step].max()) * len(step) for step in torch.split(order, 8))

    assert padded(True) < 0.75 * padded(False)
