"""peft and transformers against a registry, unchanged: push_to_hub and from_pretrained through HF_ENDPOINT."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

MODEL = """
import os, torch, transformers, peft
transformers.logging.set_verbosity_error()
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=False)
ids = torch.arange(4, 20)[None]
def base():
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(config).eval()
def adapted(seed):
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base(), lora)
    torch.manual_seed(seed)
    for name, tensor in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(tensor, std=0.3)
    return model.eval()
def kind(call):
    try:
        return call()
    except Exception as error:
        return type(error).__name__
"""


def test_peft_pushes_and_loads_by_version(guarded) -> None:
    found = guarded.stock(
        MODEL
        + """
api.create_repo("acme/tone", private=True)
logits = {}
for version, seed in (("1.0.0", 1), ("1.1.0", 2)):
    model = adapted(seed)
    model.push_to_hub("acme/tone")
    api.create_tag("acme/tone", tag=version)
    logits[version] = model(ids).logits
api.create_tag("acme/tone", tag="prod", revision="1.0.0")
def same(revision, version):
    loaded = peft.PeftModel.from_pretrained(base(), "acme/tone", revision=revision).eval()
    return bool(torch.equal(loaded(ids).logits, logits[version]))
commit = api.model_info("acme/tone", revision="1.0.0").sha
def load(token):  # from an empty cache: what alice has downloaded must not help others
    place = __import__("tempfile").mkdtemp()
    return type(peft.PeftModel.from_pretrained(base(), "acme/tone", token=token, cache_dir=place)).__name__
print(json.dumps([[kind(lambda: load(token)) for token in (False, os.environ["BOB"], os.environ["READER"])],
    same("1.0.0", "1.0.0"), same("1.1", "1.1.0"), same("prod", "1.0.0"), same("latest", "1.1.0"), same(commit, "1.0.0"),
    same(None, "1.1.0"), same("1.0.0", "1.1.0"), bool(torch.equal(base()(ids).logits, logits["1.0.0"])),
    peft.PeftConfig.from_pretrained("acme/tone", revision="1.0.0").r,
]))
""",
        token="alice",
        BOB=guarded.tokens["bob"],
        READER=guarded.tokens["reader"],
    )
    strangers, bob, reader = found[0]
    assert (strangers, bob, reader) == ("ValueError", "ValueError", "PeftModelForCausalLM")
    assert found[1:] == [True, True, True, True, True, True, False, False, 4]
    manifest = guarded.store.get("acme/tone@1.0.0").manifest
    assert (manifest.kind, manifest.task, len(manifest.tensors)) == ("lora", "causal_lm", 8)


def test_transformers_pushes_and_pulls_a_model_and_its_tokenizer(site) -> None:
    found = site.stock(
        MODEL
        + """
from tokenizers import Tokenizer, models, pre_tokenizers
vocabulary = {"<unk>": 0, **{word: index for index, word in enumerate("law code prose of and the".split(), 1)}}
inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
inner.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
model = base()
model.push_to_hub("acme/base", commit_message="weights")
tokenizer.push_to_hub("acme/base")
again = transformers.AutoModelForCausalLM.from_pretrained("acme/base").eval()
words = transformers.AutoTokenizer.from_pretrained("acme/base")
adapter = adapted(3)
adapter.peft_config["default"].base_model_name_or_path = "acme/base"
adapter.push_to_hub("acme/tone")
api.create_tag("acme/tone", tag="1.0.0")
auto = peft.AutoPeftModelForCausalLM.from_pretrained("acme/tone", revision="1.0.0").eval()
native = transformers.AutoModelForCausalLM.from_pretrained("acme/base")
native.load_adapter("acme/tone", adapter_kwargs={"revision": "1.0.0"})
print(json.dumps([
    bool(torch.equal(again(ids).logits, model(ids).logits)), words("code of law")["input_ids"],
    bool(torch.equal(auto(ids).logits, adapter(ids).logits)),
    bool(torch.equal(native.eval()(ids).logits, adapter(ids).logits)),
    kind(lambda: transformers.AutoModelForCausalLM.from_pretrained("acme/nope")), api.list_repo_files("acme/base")]))
"""
    )
    assert found[:5] == [True, [2, 4, 1], True, True, "OSError"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found[5])
    assert site.store.names() == ["acme/tone"]  # a full model lives as a draft; it is no version of an adapter
