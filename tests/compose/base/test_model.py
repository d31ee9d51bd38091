"""The frozen base: loading, quantization, identity, and the ladder that refuses another base."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from compose.base.compatibility import BaseWarning, compare
from compose.base.fingerprint import _cache_file
from compose.base.loading import saved_task
from compose.base.location import builtins, locate
from compose.base.model import check_base, identity_of, load_base, name_of, tokenizer_of
from compose.base.quantization import bits_per_parameter, quantization_of, quantized_layers
from hub.errors import BaseMismatch, GateError, HubError, IntegrityError, NotFound, UsageError
from hub.manifest import TrainedOn

TINY = "builtin:tiny-lm"
SMALL = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {"vocab_size": 101, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2)),
    "llama-tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SMALL, num_key_value_heads=2)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**SMALL, pad_token_id=1)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**{**SMALL, "ffn_dim": 64}, word_embed_proj_dim=32, do_layer_norm_before=True)
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL)),
}


@pytest.fixture
def home() -> Path:
    return Path(os.environ["HUB_HOME"])  # isolated by the conftest of all tests


@pytest.fixture(autouse=True)
def no_surprises() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", BaseWarning)
        yield


def make(family: str, directory: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    FAMILIES[family]().save_pretrained(directory)
    return directory


def tiny_copy(directory: Path) -> Path:
    return Path(shutil.copytree(builtins()["tiny-lm"], directory))


# -- loading -------------------------------------------------------------------------------------------------------


def test_the_builtin_base_is_frozen_in_eval_mode_and_writes_text() -> None:
    model = load_base(TINY)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) == 3_148_224
    words = tokenizer_of(TINY)
    batch = words("The history of the city", return_tensors="pt")
    loss = model(**batch, labels=batch["input_ids"]).loss.item()
    assert loss < 6.0  # log(4096) = 8.3 is what random weights give
    out = model.generate(**batch, max_new_tokens=5, do_sample=False)
    assert words.decode(out[0]).startswith("The history of the city")


def test_the_card_of_the_builtin_base_tells_what_it_is() -> None:
    card = (builtins()["tiny-lm"] / "README.md").read_text("utf-8")
    assert "license: apache-2.0" in card
    assert "3,148,224" in card


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), (torch.float16, torch.float16)])
def test_dtype(name: Any, dtype: torch.dtype) -> None:
    assert load_base(TINY, dtype=name).dtype == dtype


def test_attention_implementation_reaches_the_model() -> None:
    assert load_base(TINY, attn_implementation="eager").config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("family", "task"),
    [("llama", "causal_lm"), ("bert", "masked_lm"), ("roberta", "masked_lm"), ("t5", "seq2seq"), ("gpt2", "causal_lm")],
)
def test_the_task_is_what_the_checkpoint_was_saved_as(family: str, task: str, tmp_path: Path) -> None:
    directory = make(family, tmp_path / family)
    model = load_base(directory)
    assert type(model) is type(FAMILIES[family]())
    assert saved_task(model.config) == task


def test_a_classifier_gets_its_labels_and_the_same_new_head_each_time() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    with pytest.warns(BaseWarning, match=r"tiny_lm has no score.weight: drawn with seed 0"):
        one = load_base(TINY, task="classification", labels=("bad", "good", "odd"))
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.warns(BaseWarning):
        two = load_base(TINY, labels=["bad", "good", "odd"])
    assert type(one) is hf.LlamaForSequenceClassification
    assert one.config.id2label == {0: "bad", 1: "good", 2: "odd"}
    assert one.config.label2id["odd"] == 2
    assert torch.equal(one.score.weight, two.score.weight)
    assert one.score.weight.abs().sum() > 0
    assert identity_of(one) == identity_of(TINY)  # the head is not part of the base


def test_a_classifier_without_a_padding_token_gets_one(tmp_path: Path) -> None:
    """It looks for the last token before the padding, so without one a batch of several texts would be refused."""
    directory = tmp_path / "gpt2"
    torch.manual_seed(0)
    hf.GPT2LMHeadModel(hf.GPT2Config(**{**GPT2, "eos_token_id": 5, "pad_token_id": None})).save_pretrained(directory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BaseWarning)  # of the new head
        model = load_base(directory, labels=["no", "yes"])
    assert model.config.pad_token_id == 5
    ids = torch.tensor([[7, 8, 9], [7, 5, 5]])
    with torch.no_grad():
        both, short = model(input_ids=ids).logits, model(input_ids=ids[1:, :1]).logits
    torch.testing.assert_close(both[1:], short)


def test_regression_and_token_classification() -> None:
    with pytest.warns(BaseWarning):
        model = load_base(TINY, task="regression")
    assert model.num_labels == 1
    assert model.config.problem_type == "regression"
    with pytest.warns(BaseWarning):
        assert load_base(TINY, task="token_classification", labels=["O", "B"]).num_labels == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quantize": "nf5"}, "did you mean nf4"),
        ({"task": "clasification"}, "did you mean classification"),
        ({"dtype": "bf-16"}, "did you mean bf16"),
        ({"task": "causal_lm", "labels": ["a", "b"]}, "labels go with"),
        ({"labels": ["a", "a"]}, "different names"),
        ({"labels": ["a"]}, "two or more"),
    ],
)
def test_wrong_options_are_refused_with_a_suggestion(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_base(TINY, **options)


def test_a_task_that_the_family_lacks_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="cannot be loaded for masked_lm"):
        load_base(TINY, task="masked_lm")


# -- quantization --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantize", "double_quant", "bits"), [("nf4", True, 4.127), ("nf4", False, 4.5), ("int8", True, 8.14)]
)
def test_quantized_builtin_base(quantize: str, double_quant: bool, bits: float) -> None:
    dense, model = load_base(TINY), load_base(TINY, quantize=quantize, double_quant=double_quant)
    layers = quantized_layers(model)
    assert len(layers) == 42  # 6 blocks of q, k, v, o, gate, up, down; not the tied head
    assert bits_per_parameter(model) == pytest.approx(bits, abs=0.01)
    assert quantization_of(model) == quantize
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)
    ids = tokenizer_of(TINY)("The history of the city is long. import numpy as np", return_tensors="pt")["input_ids"]
    losses = [m(input_ids=ids, labels=ids).loss.item() for m in (dense, model)]
    assert losses[1] == pytest.approx(losses[0], abs=0.2)
    assert losses[1] != losses[0]
    assert identity_of(model) == identity_of(dense) == identity_of(TINY)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_gradients_flow_through_a_quantized_base(quantize: str) -> None:
    model = load_base(TINY, quantize=quantize, dtype="fp32")
    ids = torch.arange(4, 20)[None]
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)

    def gradient() -> torch.Tensor:
        embedded.grad = None
        model(inputs_embeds=embedded, labels=ids).loss.backward()
        assert embedded.grad is not None
        return embedded.grad.clone()

    fresh = gradient()
    assert torch.isfinite(fresh).all()
    assert fresh.abs().sum() > 0
    with torch.no_grad():
        model(ids)  # where a CPU has AVX512-BF16, bitsandbytes would repack its weights here and lose the gradient
    assert torch.equal(gradient(), fresh)


def test_a_model_that_bitsandbytes_has_repacked_is_refused() -> None:
    options = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    held = hf.AutoModelForCausalLM.from_pretrained(
        locate(TINY).directory, dtype=torch.float32, quantization_config=options
    )
    layer = next(iter(quantized_layers(held).values()))
    layer.weight.quant_state.packing_format_for_cpu = True  # as a forward in eval mode does with AVX512-BF16
    with pytest.raises(GateError, match=r"has repacked model\.layers\.0\.self_attn\.q_proj"):
        load_base(held)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"t5"}))
def test_every_linear_of_the_blocks_is_quantized_and_no_head(family: str, tmp_path: Path) -> None:
    model = load_base(make(family, tmp_path / family), quantize="nf4", dtype="fp32")
    done = set(quantized_layers(model))
    linear = {p for p, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    assert done == {path for path in linear if re.search(r"\.\d+\.", path)}
    assert len(done) >= 8


def test_quantized_conv1d_computes_what_the_dense_one_does(tmp_path: Path) -> None:
    directory = make("gpt2", tmp_path / "gpt2")
    ids = torch.arange(40)[None]
    dense = load_base(directory)(ids).logits
    held = load_base(directory, quantize="int8")(ids).logits
    assert (held - dense).norm() < 0.05 * dense.norm()


def test_what_stays_dense_is_told_once(tmp_path: Path) -> None:
    directory = make("t5", tmp_path / "t5")
    with pytest.warns(
        BaseWarning, match=r"28 linear layers and leaves [0-9.]+% .* in torch.float32: .*DenseReluDense.wo"
    ) as told:
        load_base(directory, quantize="nf4")
    assert len([w for w in told if issubclass(w.category, BaseWarning)]) == 1


def test_a_quantized_classifier_keeps_its_head_and_pooler_dense(tmp_path: Path) -> None:
    directory = make("bert", tmp_path / "bert")
    with pytest.warns(BaseWarning, match=r"bert.pooler.dense.bias.*drawn with seed 0"):
        model = load_base(directory, quantize="nf4", labels=["no", "yes"])
    done = set(quantized_layers(model))
    assert len(done) == 12
    assert not any("pooler" in path or "classifier" in path for path in done)
    out = model(torch.tensor([[1, 2, 3]])).logits
    assert out.shape == (1, 2)
    assert torch.isfinite(out).all()


def test_int8_tells_of_its_cast_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("bitsandbytes.autograd._functions"), "filters", [])
    model = load_base(TINY, quantize="int8")
    for _ in range(2):
        model(torch.arange(4, 12)[None])
    assert sum("MatMul8bitLt" in record.getMessage() for record in caplog.records) == 1


def test_loading_is_silent_when_piped_and_leaves_the_log_level_alone(capfd: pytest.CaptureFixture[str]) -> None:
    level = hf.utils.logging.get_verbosity()
    load_base(TINY)
    assert capfd.readouterr() == ("", "")
    assert hf.utils.logging.get_verbosity() == level
    assert logging.getLogger("transformers").level == level


# -- finding -------------------------------------------------------------------------------------------------------


def test_unknown_builtin_is_suggested() -> None:
    with pytest.raises(NotFound, match="did you mean tiny-lm"):
        locate("builtin:tiny-ml")


@pytest.mark.parametrize("base", ["./nowhere", "/no/such/dir", Path("nowhere"), "a b", "org/name/deep"])
def test_a_missing_directory_is_named(base: Any) -> None:
    with pytest.raises(NotFound, match="there is no base at") as caught:
        locate(base)
    assert "builtin:tiny-lm" in str(caught.value.hint)


@pytest.mark.parametrize("offline", [True, False])
def test_a_base_that_is_not_here_offline_says_the_next_command(
    offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NotFound, match="no-org/no-model") as caught:
        locate("no-org/no-model", offline=offline)
    assert "hf download no-org/no-model" in str(caught.value.hint)


def test_a_base_in_the_hugging_face_cache_loads_offline_with_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--org--little"
    blobs, snapshot = repo / "blobs", repo / "snapshots" / commit
    make("llama", blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = load_base("org/little")
    found = identity_of(model)
    assert (found.repo, found.revision) == ("org/little", commit)
    assert name_of(model) == "org/little"
    assert identity_of(f"org/little@{commit}") == identity_of(snapshot) == found


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    directory = make("llama", tmp_path / "m")
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(weights, directory / "pytorch_model.bin")
    for use in (load_base, identity_of):
        with pytest.raises(GateError, match=r"pickled weights only \(pytorch_model.bin\)") as caught:
            use(directory)
        assert "save_pretrained" in str(caught.value.hint)


def test_an_adapter_directory_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(GateError, match="holds an adapter"):
        load_base(tmp_path)


def test_an_empty_directory_is_no_base(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"has no config\.json"):
        load_base(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "no-such-model"}'])
def test_a_broken_config_is_named(text: str, tmp_path: Path) -> None:
    directory = make("llama", tmp_path / "m")
    (directory / "config.json").write_text(text)
    with pytest.raises(HubError, match=r"config\.json"):
        load_base(directory)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "model.bin"])
def test_an_index_cannot_name_files_elsewhere(name: str, tmp_path: Path) -> None:
    directory = make("llama", tmp_path / "m")
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(GateError, match="names"):
        load_base(directory)


def test_a_truncated_file_is_an_integrity_error(tmp_path: Path) -> None:
    directory = make("llama", tmp_path / "m")
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(IntegrityError, match="truncated"):
        identity_of(directory)
    with pytest.raises(IntegrityError, match="truncated"):
        load_base(directory)


def test_a_checkpoint_that_lacks_a_layer_is_refused(tmp_path: Path) -> None:
    directory = make("llama", tmp_path / "m")
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GateError, match=r"lacks tensors of LlamaForCausalLM: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_base(directory)


def test_weights_that_are_quantized_on_disk_are_refused(tmp_path: Path) -> None:
    load_base(TINY, quantize="nf4").save_pretrained(tmp_path)
    with pytest.raises(GateError, match="quantized already"):
        load_base(tmp_path)


# -- models loaded already -----------------------------------------------------------------------------------------


def test_a_loaded_model_is_taken_as_it_is() -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(builtins()["tiny-lm"]).train()
    flags = [p.requires_grad for p in model.parameters()]
    assert load_base(model) is model
    assert not model.training
    assert [p.requires_grad for p in model.parameters()] == flags  # frozen, and thawed, with the adapters
    assert load_base(model, dtype="fp32").dtype == torch.float32


@pytest.mark.parametrize(
    "options",
    [{"quantize": "nf4"}, {"task": "classification"}, {"labels": ["a", "b"]}, {"attn_implementation": "eager"}],
)
def test_a_loaded_model_cannot_be_loaded_otherwise(options: dict[str, Any]) -> None:
    model = FAMILIES["llama"]()
    with pytest.raises(UsageError, match="loaded already"):
        load_base(model, **options)


def test_a_quantized_model_keeps_its_dtype() -> None:
    model = load_base(TINY, quantize="nf4")
    assert load_base(model, quantize="nf4") is model
    with pytest.raises(UsageError, match="keeps its dtype"):
        load_base(model, dtype="fp32")


def test_tokenizers() -> None:
    words = tokenizer_of(TINY)
    assert words.pad_token_id == 1
    assert tokenizer_of(load_base(TINY)).get_vocab() == words.get_vocab()
    with pytest.raises(GateError, match="made in memory"):
        tokenizer_of(FAMILIES["llama"]())


def test_a_base_without_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="has no tokenizer"):
        tokenizer_of(make("llama", tmp_path / "m"))


def test_a_tokenizer_without_padding_pads_with_its_end_token(tmp_path: Path) -> None:
    directory = tiny_copy(tmp_path / "copy")
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    assert tokenizer_of(directory).pad_token_id == tokenizer_of(directory).eos_token_id == 0


# -- identity ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_model_in_memory_has_the_identity_of_the_directory_it_saves(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().to(dtype)
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    mine = identity_of(model)
    for name in ("saved", "sharded"):
        stored = identity_of(tmp_path / name)
        assert stored.weights == mine.weights
        assert stored.weights_fingerprint == mine.weights_fingerprint
        assert stored.arch_digest == mine.arch_digest
        assert stored.config_digest == mine.config_digest
        assert stored.vocab_size == mine.vocab_size == 101
        assert stored.repo == name
        assert identity_of(load_base(tmp_path / name)) == stored


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_a_model_someone_else_loaded_is_recognized_by_its_tensors(dtype: torch.dtype) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(builtins()["tiny-lm"], dtype=dtype)
    assert identity_of(load_base(model)).weights == identity_of(TINY).weights
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] += 1
    changed = identity_of(model)
    assert changed.weights != identity_of(TINY).weights
    if dtype == torch.bfloat16:
        with pytest.raises(BaseMismatch, match=r"1 of 56 tensors differ, model\.layers\.3\.mlp\.up_proj\.weight"):
            compare(identity_of(TINY), changed)


def test_a_quantized_model_someone_else_loaded_is_known_by_its_files(tmp_path: Path) -> None:
    directory = tiny_copy(tmp_path / "copy")
    options = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = hf.AutoModelForCausalLM.from_pretrained(directory, quantization_config=options)
    assert load_base(model) is model
    assert identity_of(model).weights == identity_of(TINY).weights
    orphan = hf.AutoModelForCausalLM.from_pretrained(directory, quantization_config=options)
    shutil.rmtree(directory)
    with pytest.raises(GateError, match="unquantized files are not at hand"):
        identity_of(orphan)


def test_identity_is_the_same_with_adapters_in_place() -> None:
    from compose.runtime.model_runtime import runtime

    torch.manual_seed(0)
    model = FAMILIES["llama-tied"]()
    before = identity_of(model)
    runtime(model)
    for site in list(runtime(model).sites):
        runtime(model).slot(site.path)
    del model.__dict__["_moduloom_base"]
    assert identity_of(model).weights == before.weights


def test_fingerprints_are_defined_by_dtype_shape_and_bytes(tmp_path: Path) -> None:
    import hashlib

    directory = make("llama", tmp_path / "m")
    weight = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    expected = hashlib.sha256(b"F32|101x32|" + weight.numpy().tobytes()).hexdigest()[:16]
    assert identity_of(directory).weights["model.embed_tokens.weight"] == expected


def test_the_cache_is_used_and_never_trusted_blindly(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make("llama", tmp_path / "m")
    file = directory / "model.safetensors"
    first = identity_of(directory)
    cache = _cache_file(file.resolve())
    assert cache.is_file()
    assert home in cache.parents
    with monkeypatch.context() as patch:
        patch.setattr("compose.base.fingerprint._hash_tensor", lambda *_: pytest.fail("hashed again"))
        assert identity_of(directory) == first

    times = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, same modification time
    changed = identity_of(directory)
    assert changed.weights != first.weights

    for damage in (b"", b"{", b"[]", b'{"path": 1}', cache.read_bytes()[:-20]):
        cache.write_bytes(damage)
        assert identity_of(directory) == changed


def test_a_home_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HUB_HOME", str(tmp_path / "file" / "home"))
    assert identity_of(TINY) == identity_of(TINY)


def test_tokenizer_and_chat_template_are_part_of_the_identity(tmp_path: Path) -> None:
    directory = tiny_copy(tmp_path / "copy")
    plain = identity_of(directory)
    assert plain.tokenizer_digest == identity_of(TINY).tokenizer_digest
    assert plain.chat_template_digest is None
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    assert identity_of(directory).chat_template_digest is not None
    (directory / "tokenizer.json").write_text("{}")
    assert identity_of(directory).tokenizer_digest != plain.tokenizer_digest


# -- the ladder ----------------------------------------------------------------------------------------------------


def test_a_wrong_base_of_the_same_shapes_is_refused_by_name(tmp_path: Path) -> None:
    directory = tiny_copy(tmp_path / "other")
    weights = load_file(directory / "model.safetensors")
    name = "model.layers.4.self_attn.v_proj.weight"
    weights[name] = weights[name] * 1.01
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    made_for = identity_of(TINY)
    for quantize in ("none", "nf4"):
        model = load_base(directory, quantize=quantize)
        with pytest.raises(BaseMismatch) as caught:
            check_base(made_for, model, ref="ns/a@1.0.0")
        message = str(caught.value)
        assert "ns/a@1.0.0 was made for builtin:tiny-lm" in message
        assert "1 of 56 tensors differ" in message
        assert name in message
        assert caught.value.ref == "ns/a@1.0.0"
        assert "allow_base_drift" in str(caught.value.hint)
        with pytest.warns(BaseWarning, match="other weights"):
            assert check_base(made_for, model, allow_drift=True) == "drift"


def test_another_architecture_is_refused_always(tmp_path: Path) -> None:
    model = load_base(make("llama", tmp_path / "m"))
    with pytest.raises(BaseMismatch, match="another architecture") as caught:
        check_base(identity_of(TINY), model, allow_drift=True)
    assert "missing on one side" in str(caught.value)


def test_a_resized_embedding_names_itself(tmp_path: Path) -> None:
    model = load_base(TINY)
    model.resize_token_embeddings(4100)
    model.save_pretrained(tmp_path)
    with pytest.raises(BaseMismatch, match=r"1 of 56 tensors differ, model\.embed_tokens\.weight"):
        compare(identity_of(TINY), identity_of(tmp_path))


def test_the_same_weights_in_other_numbers_are_warned_of() -> None:
    model = load_base(TINY, quantize="nf4")
    made_for = identity_of(TINY)
    assert check_base(made_for, model) == "exact"
    assert check_base(made_for, model, trained_on=TrainedOn(quantization="nf4")) == "exact"
    with pytest.warns(BaseWarning, match="ns/a was trained on a base held as none; this one is held as nf4"):
        assert check_base(made_for, model, trained_on=TrainedOn(), ref="ns/a") == "quantization"


def test_another_config_or_tokenizer_around_the_same_weights_is_warned_of(tmp_path: Path) -> None:
    directory = tiny_copy(tmp_path / "copy")
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5e5
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.warns(BaseWarning, match="another config.json"):
        assert compare(identity_of(TINY), identity_of(directory)) == "exact"
    shutil.copy(builtins()["tiny-lm"] / "config.json", directory / "config.json")
    (directory / "tokenizer.json").write_text("{}")
    with pytest.warns(BaseWarning, match="another tokenizer"):
        compare(identity_of(TINY), identity_of(directory))
    config = json.loads((directory / "config.json").read_text())
    config["transformers_version"] = "9.9"
    (directory / "config.json").write_text(json.dumps(config))
    shutil.copy(builtins()["tiny-lm"] / "tokenizer.json", directory / "tokenizer.json")
    assert compare(identity_of(TINY), identity_of(directory)) == "exact"


SEES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}
SEES |= {"patch_size": 4}
OWN = {  # what no task of texts loads
    "ViTForImageClassification": hf.ViTConfig(**SEES),
    "Wav2Vec2ForCTC": hf.Wav2Vec2Config(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        conv_dim=[8],
        conv_kernel=[8],
        conv_stride=[4],
        num_feat_extract_layers=1,
        num_conv_pos_embedding_groups=2,
    ),
    "CLIPModel": hf.CLIPConfig(text_config={**SMALL, "eos_token_id": 2}, vision_config=SEES, projection_dim=8),
    "SegformerForSemanticSegmentation": hf.SegformerConfig(
        hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1], decoder_hidden_size=8
    ),
}


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("architecture", OWN)
def test_a_base_of_images_or_sounds_is_loaded_as_it_was_saved(architecture: str, quantize: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    getattr(hf, architecture)(OWN[architecture]).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BaseWarning)  # of convolutions, which stay dense
        model = load_base(tmp_path, quantize=quantize)
    assert type(model).__name__ == architecture
    assert quantization_of(model) == quantize
    with pytest.raises(GateError, match="has no model for masked_lm"):
        load_base(tmp_path, task="masked_lm")
