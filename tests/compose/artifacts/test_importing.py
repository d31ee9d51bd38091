"""`hub import`: directories that PEFT itself has saved, and what is refused by name; then probes of what came in."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import compose
import hub
from hub.foreign.sources import find
from hub.store import Store

TINY = "builtin:tiny-lm"
FACTS = ("--name", "acme/tone", "--version", "1.0.0", "--base", TINY)
CONFIGS = {
    "lora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=r".*\.[01]\.self_attn\.(q|v)_proj"),
    "rslora": peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["o_proj"], layers_to_transform=[2]),
    "dora": peft.LoraConfig(r=3, use_dora=True, target_modules=["down_proj"]),
    "head": peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
IDS = torch.arange(40, 56).reshape(1, -1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories that PEFT has written, and the logits its own models give."""
    root = tmp_path_factory.mktemp("peft")
    made: dict[str, tuple[Path, torch.Tensor]] = {}

    def make(name: str, adapter: str = "default") -> tuple[Path, torch.Tensor]:
        key = f"{name}-{adapter}"
        if key not in made:
            model = peft.get_peft_model(compose.load(TINY, dtype="fp32"), CONFIGS[name], adapter_name=adapter).eval()
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for parameter in (p for p in model.parameters() if p.requires_grad):
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
                logits = model(input_ids=IDS).logits[:, -len(IDS[0]) :]
            model.save_pretrained(root / key)
            made[key] = root / key, logits
        return made[key]

    return make


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_what_peft_saved_does_the_same_here(name: str, saved, cli) -> None:
    directory, wanted = saved(name)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    result = cli("import", str(directory), *FACTS, "--license", "mit")
    assert result.exit_code == 0, result.output
    artifact = Store().get("acme/tone")
    assert artifact.manifest.kind == {"rslora": "lora", "head": "lora"}.get(name, name)
    assert artifact.manifest.base.repo == TINY
    assert all("*" not in path and "(" not in path for path in artifact.manifest.placement)
    assert ("extra.safetensors" in artifact.files) == (name == "head")
    assert Store().verify() == []
    assert before == {path.name: path.read_bytes() for path in directory.iterdir()}
    model = compose.load(TINY, "acme/tone", dtype="fp32")
    with torch.no_grad():
        found = model(input_ids=IDS).logits[:, -len(IDS[0]) :]
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)


@pytest.mark.filterwarnings("ignore:.*drawn with seed 0")
@pytest.mark.parametrize("name", ["houlsby", "lora", "prefix"])
def test_what_the_adapters_library_saved_does_the_same_here(name: str, cli, tmp_path: Path) -> None:
    golden = Path(__file__).parents[2] / "golden" / "adapterhub"
    shape = {"vocab_size": 53, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "max_position_embeddings": 24, "pad_token_id": 1}
    base = transformers.BertModel(transformers.BertConfig(**shape))
    base.load_state_dict(load_file(golden / "base.safetensors"))
    base.save_pretrained(tmp_path / "base")
    facts = ("--name", "acme/old", "--version", "1.0", "--base", str(tmp_path / "base"), "--task", "masked_lm")
    result = cli("import", str(golden / name), *facts)
    assert result.exit_code == 0, result.output
    wanted = load_file(golden / "outputs.safetensors")
    model = compose.load(tmp_path / "base", "acme/old")
    batch = {"input_ids": wanted["ids"], "attention_mask": wanted["mask"]}
    with torch.no_grad():
        found = model(**batch, output_hidden_states=True).hidden_states[-1]
    mask = wanted["mask"].bool()
    torch.testing.assert_close(found[mask], wanted[name][mask], atol=1e-4, rtol=1e-4)


def test_the_same_adapter_imported_or_pushed_again_is_the_same_artifact(
    saved, cli, tmp_path: Path, monkeypatch
) -> None:
    """Later, of a copy, or by somebody else: no clock and no path of a machine is in what an artifact is."""
    directory, _ = saved("lora")
    copy = shutil.copytree(directory, tmp_path / "copy")
    assert cli("import", str(directory), *FACTS).exit_code == 0
    digest = Store().get("acme/tone").digest
    time.sleep(1.1)
    assert cli("import", str(copy), *FACTS).exit_code == 0
    assert [artifact.digest for artifact in Store().list()] == [digest]
    other = Store(tmp_path / "other")
    hub.import_(copy, name="acme/tone", version="1.0.0", base=TINY, store=other)
    assert other.get("acme/tone").digest == digest
    pushed = [
        hub.push(path, name="acme/pushed", version="1.0.0", base=TINY).digest for path in _twice(directory, tmp_path)
    ]
    assert pushed[0] == pushed[1]


def _twice(directory: Path, tmp_path: Path):
    for number in range(2):
        time.sleep(1.1 * number)
        yield shutil.copytree(directory, tmp_path / f"{number}")


def test_missing_facts_are_asked_for(saved, cli) -> None:
    directory, _ = saved("lora")
    result = cli("import", str(directory), "--name", "acme/tone")
    assert result.exit_code == 2
    assert "--version, --base" in result.stderr
    assert "names the base" in result.stderr
    assert Store().names() == []


def test_adapters_of_several_names(saved, cli, tmp_path: Path) -> None:
    directory, _ = saved("lora", "tone")
    assert find(str(directory), tmp_path).directory == directory / "tone"
    other = directory / "other"
    other.mkdir()
    for file in (directory / "tone").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    result = cli("import", str(directory), *FACTS)
    assert result.exit_code == 2
    assert "other, tone" in result.stderr
    assert cli("import", str(directory), *FACTS, "--subfolder", "tone").exit_code == 0


def test_each_adapter_of_a_directory_of_several(saved, cli, tmp_path: Path) -> None:
    root = tmp_path / "several"
    for name in ("formal tone", "law"):
        shutil.copytree(saved("lora", "tone")[0] / "tone", root / name)
    result = cli("import", str(root), *FACTS, "--each", "--json")
    assert result.exit_code == 0, result.output
    assert [each["ref"] for each in json.loads(result.stdout)] == ["acme/tone-formal-tone@1.0.0", "acme/tone-law@1.0.0"]
    assert cli("import", str(root), *FACTS, "--each", "--tag", "prod").exit_code == 2
    # All of them or none: where one cannot be read, nothing is published.
    config = root / "law" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "VBLORA"}))
    result = cli("import", str(root), "--name", "acme/again", *FACTS[2:], "--each")
    assert result.exit_code == 1
    assert "VBLORA" in result.stderr
    assert [name for name in Store().names() if "again" in name] == []


def test_adapters_below_the_one_that_is_taken_are_told(saved, cli, tmp_path: Path) -> None:
    directory = shutil.copytree(saved("lora")[0], tmp_path / "a")
    shutil.copytree(saved("lora", "tone")[0] / "tone", directory / "checkpoint-500")
    result = cli("import", str(directory), *FACTS)
    assert result.exit_code == 0
    assert "left out: checkpoint-500/" in result.stderr


def sharded(directory: Path, out: Path) -> Path:
    """The weights in two files and an index, as transformers writes large ones."""
    shutil.copytree(directory, out)
    tensors = load_file(out / "adapter_model.safetensors")
    (out / "adapter_model.safetensors").unlink()
    names = {name: f"adapter_model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(names.values()):
        save_file({name: tensors[name] for name in names if names[name] == file}, out / file)
    index = {"metadata": {"total_size": 0}, "weight_map": names}
    (out / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    return out


def test_weights_in_several_files(saved, cli, tmp_path: Path) -> None:
    directory, _ = saved("lora")
    shards = sharded(directory, tmp_path / "shards")
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    for source in (shards, directory):  # the same adapter, however many files it lies in
        assert cli("import", str(source), *FACTS).exit_code == 0
    assert Store().verify() == []
    assert before == {path.name: path.read_bytes() for path in shards.iterdir()}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda d, index: (d / "adapter_model-00002-of-00002.safetensors").unlink(), "lacks adapter_model-00002"),
        (lambda d, index: index["weight_map"].popitem(), "do not hold each of the tensors that it lists once"),
        (lambda d, index: index["weight_map"].update(x="../secret.safetensors"), "no safetensors file beside it"),
        (lambda d, index: index["weight_map"].update(x="x.bin"), "no safetensors file beside it"),
        (lambda d, index: index.update(weight_map=[]), "no weight_map"),
        (
            lambda d, index: shutil.copyfile(
                d / "adapter_model-00001-of-00002.safetensors", d / "adapter_model-00002-of-00002.safetensors"
            ),
            "do not hold each",
        ),
    ],
)
def test_shards_that_are_not_whole_are_refused(saved, cli, tmp_path: Path, edit, words: str) -> None:
    directory = sharded(saved("lora")[0], tmp_path / "shards")
    path = directory / "adapter_model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(directory, index)
    path.write_text(json.dumps(index))
    result = cli("import", str(directory), *FACTS)
    assert result.exit_code == 1
    assert words in result.stderr
    assert Store().names() == []


def test_tokenizer_and_chat_template_travel(saved, cli, tmp_path: Path) -> None:
    """What an adapter was trained to read is part of it: in the artifact, in what is pulled and exported."""
    directory = shutil.copytree(saved("lora")[0], tmp_path / "a")
    compose.tokenizer(TINY).save_pretrained(directory)
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (directory / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    (directory / "optimizer.pt").write_bytes(b"no")
    result = cli("import", str(directory), *FACTS)
    assert result.exit_code == 0, result.output
    assert "left out: optimizer.pt" in result.stderr
    artifact = Store().get("acme/tone")
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model"} <= set(artifact.files)
    assert cli("export", "acme/tone", "--format", "peft", "--to", str(tmp_path / "out")).exit_code == 0
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert read.apply_chat_template([{"content": "hi"}], tokenize=False) == "hi"
    (directory / "tokenizer.model").write_bytes(b"\x80\x04.")
    result = cli("import", str(directory), "--name", "acme/pickled", *FACTS[2:])
    assert result.exit_code == 1
    assert "tokenizer.model holds a pickle" in result.stderr


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (peft.VBLoRAConfig(target_modules=["q_proj"], num_vectors=8, vector_length=24), "VBLORA"),
        (peft.FourierFTConfig(target_modules=["q_proj"], n_frequency=10), "FOURIERFT"),
        (peft.PolyConfig(target_modules=["q_proj"]), "POLY"),
    ],
)
def test_types_without_a_kind_are_refused_by_name(config, word: str, cli, tmp_path: Path) -> None:
    peft.get_peft_model(compose.load(TINY, dtype="fp32"), config).save_pretrained(tmp_path / "x")
    result = cli("import", str(tmp_path / "x"), *FACTS)
    assert result.exit_code == 1
    assert word in result.stderr
    assert "PEFT types read here" in result.stderr
    assert Store().names() == []


def broken(saved, tmp_path: Path, tensors=None, **fields) -> Path:
    directory = tmp_path / "broken"
    directory.mkdir()
    source, _ = saved("lora")
    config = json.loads((source / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    found = load_file(source / "adapter_model.safetensors")
    save_file(tensors(found) if tensors else found, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("tensors", "fields", "words"),
    [
        (None, {"modules_to_save": ["nothing"]}, "nothing"),
        (None, {"bias": "all"}, "bias='all'"),
        (None, {"a_field_of_tomorrow": 3}, "a_field_of_tomorrow=3"),
        (None, {"r": 5}, "has shape (4, 192)"),
        (None, {"target_modules": ["no_such"]}, "matches no linear layer"),
        (
            lambda t: {k.replace("base_model.model.", "module."): v for k, v in t.items()},
            {},
            "missing base_model.model",
        ),
        (
            lambda t: {k: v for k, v in t.items() if ".layers.1." not in k},
            {},
            "missing base_model.model.model.layers.1",
        ),
        (lambda t: {k: v * np.nan for k, v in t.items()}, {}, "NaN"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(saved, cli, tmp_path: Path, tensors, fields, words: str) -> None:
    result = cli("import", str(broken(saved, tmp_path, tensors, **fields)), *FACTS)
    assert result.exit_code == 1
    assert words in result.stderr
    assert "hint:" in result.stderr
    assert Store().names() == []


def test_pickles_and_directories_of_models(cli, saved, tmp_path: Path) -> None:
    directory = broken(saved, tmp_path)
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    result = cli("import", str(directory), *FACTS)
    assert result.exit_code == 1
    assert "never read" in result.stderr
    (directory / "adapter_config.json").unlink()
    assert "model rather than an adapter" in cli("import", str(directory), *FACTS).stderr
    assert cli("import", "hf://not a repo", *FACTS).exit_code == 2
    assert "cannot be reached" in cli("import", "hf://owner/name", *FACTS).stderr  # tests run offline


def test_probes_say_whether_it_does_here_what_it_did_there(saved, cli) -> None:
    directory, _ = saved("lora")
    assert cli("import", str(directory), *FACTS).exit_code == 0
    result = cli("verify", "acme/tone", "--run")
    assert result.exit_code == 1
    assert "without probes" in result.stderr
    facts = [word.replace("1.0.0", "1.1.0") for word in FACTS]
    assert cli("import", str(directory), *facts, "--probe").exit_code == 0
    report = json.loads(cli("verify", "acme/tone", "--run", "--json").stdout)
    assert report["ok"]
    assert report["run"]["error"] <= 1e-3  # the same machine, the same dtype
    assert report["run"]["base_error"] <= 1e-3
    text = cli("verify", "acme/tone", "--run").stderr
    assert "does here what it did" in text


def test_probes_catch_an_edited_alpha_and_another_base(saved, cli, tmp_path: Path) -> None:
    """What no shape shows: the same keys and shapes, another effect."""
    directory, _ = saved("lora")
    assert cli("import", str(directory), *FACTS, "--probe").exit_code == 0
    out = tmp_path / "out"
    Store().get("acme/tone").materialize(out)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 600}))
    assert cli("push", str(out), "--repack", "--version", "1.0.1").exit_code == 0
    result = cli("verify", "acme/tone@1.0.1", "--run")
    assert result.exit_code == 1
    assert "does not do here what it did there" in result.stdout
    other = compose.load(TINY)
    with torch.no_grad():
        other.model.layers[1].self_attn.q_proj.weight.mul_(0.5)
    other.save_pretrained(tmp_path / "other")
    result = cli("verify", "acme/tone@1.0.0", "--run", "--base", str(tmp_path / "other"))
    assert result.exit_code == 1
    assert "q_proj" in result.stderr  # the base ladder names the tensor that differs
    result = cli("verify", "acme/tone@1.0.0", "--run", "--base", str(tmp_path / "other"), "--allow-base-drift")
    assert result.exit_code == 1
    assert "the bare base differs" in result.stdout
