"""What a name stands for, without the engine that asks: digests, moves, pulls, refusals; and what is written for it."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import compose
import hub
from compose.base.location import locate
from compose.errors import KindError, PlanError
from hub.errors import BaseMismatch, NotFound, UsageError
from hub.store import Store
from router.upstream.lowered import Lowering

BASE = "builtin:tiny-lm"
PROMPT = torch.tensor([[5, 9, 200, 31]])


def test_equal_expressions_are_one_and_others_are_not(names):
    mine = names()
    same = [
        "0.5 * law + 0.5 * code",
        '0.5 * local/code@1.0.0 + 0.5 * "law>=1,<2"',
        "0.5 * (law@latest + code)",
    ]
    assert len({mine.find(text).digest for text in same}) == 1
    others = ["law", "code", "0.5 * law + 0.25 * code", "average(law, code)", "ties(law, code)"]
    digests = {mine.find(text).digest for text in (*others, same[0])}
    assert len(digests) == 6
    assert names(rank=8).find("law").digest not in digests, "another limit may write another adapter"
    meaning = mine.find(same[0])
    assert meaning.shown == "0.5 * local/code@1.0.0 + 0.5 * local/law@1.0.0"
    assert meaning.name == f"{meaning.shown}#{meaning.digest[:12]}"
    assert 0 < meaning.number < 2**60
    assert mine.find(meaning.text) == mine.find(meaning.name) == meaning, "both are expressions too"
    assert mine.find("law>=1,<2") == mine.find("law"), "a range alone needs no quotes"


def test_a_name_that_moves_is_another_adapter_at_once(names, home, published, tmp_path):
    mine = names()
    home.tag("local/law@1.0.0", "prod")
    before = mine.now("0.5 * law@prod")
    assert before == mine.find("0.5 * law@prod") == mine.now("0.5 * law@prod")
    others = type(published)(tmp_path / "others")
    others.publish("law", seed=77, version="1.1.0")
    hub.pull("law", from_=str(others.store.root), store=Store())
    assert mine.now("0.5 * law@prod") == before, "the alias has not moved"
    assert mine.now("law").shown == "local/law@1.1.0"
    home.tag("local/law@1.1.0", "prod")
    after = mine.now("0.5 * law@prod")
    assert after.shown == "0.5 * local/law@1.1.0" and after.name != before.name and after.number != before.number
    assert mine.now("law@1.0.0").shown == "local/law@1.0.0"


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("nobody", NotFound, "nobody"),
        ("0.5 * law + nobody", NotFound, "nobody"),
        ("./law", UsageError, "./law"),
        ("mood", KindError, "classification"),
        ("ensemble.mean(law, code)", KindError, "outputs"),
        ("ties(law, tone", UsageError, "ties(law, tone"),
        ("0.5 * nosuch(law, code)", UsageError, "nosuch"),
    ],
)
def test_what_is_none_is_refused_by_name(names, text, error, says):
    mine = names()
    assert mine.now(text) is None, "the quick way raises nothing"
    with pytest.raises(error) as told:
        mine.find(text)
    assert says in str(told.value)


def test_a_router_is_no_adapter(names, routers, published):
    hub.pull("local/near", from_=str(published.store.root), store=Store())
    with pytest.raises(PlanError, match="router"):
        names().find("near")


def test_another_base_is_refused(names, tmp_path):
    config = AutoConfig.from_pretrained(locate(BASE).directory)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    mine = names(tmp_path / "other")
    assert mine.now("law") is None
    with pytest.raises(BaseMismatch, match=r"local/law.*tensors differ"):
        mine.find("law")


def test_what_is_not_here_is_pulled_from_named_remotes_only(names, published, tmp_path, monkeypatch):
    monkeypatch.setenv("HUB_HOME", str(tmp_path / "empty"))
    with pytest.raises(NotFound):
        names().find("0.5 * law")
    hub.Remotes().add("team", str(published.store.root))
    mine = names(remotes=("team",))
    assert mine.now("0.5 * law") is None, "the quick way asks no remote"
    assert mine.find("0.5 * law").shown == "0.5 * local/law@1.0.0"
    assert str(Store().get("law").ref) == "local/law@1.0.0"
    with pytest.raises(NotFound):
        mine.find("nobody")


def test_bytes_that_are_not_what_was_published_never_arrive(names, home, published, tmp_path, monkeypatch):
    weights = home.get("law").blob("adapter_model.safetensors")
    weights.chmod(0o600)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    monkeypatch.setenv("HUB_HOME", str(tmp_path / "young"))
    with pytest.raises(hub.HubError):
        names(remotes=(str(home.root),)).find("law")
    with pytest.raises(NotFound):
        Store().get("law")


def logits(text, directory=None):
    adapters = None if directory is None else {"it": directory}
    with torch.no_grad():
        return compose.load(BASE, text, dtype="fp32", adapters=adapters)(PROMPT).logits


def test_an_expression_is_written_once_as_the_lora_it_is(names):
    mine = Lowering(names(rank=16))
    with ThreadPoolExecutor(3) as several:
        made = list(several.map(mine.get, ["0.5 * law + code", "code + 0.5 * law", "0.5 * local/law@1.0.0 + code"]))
    assert len({one.directory for one in made}) == 1
    left = [path.name for path in mine.root.iterdir() if path.is_dir()]
    assert left == [made[0].meaning.digest], "nothing half written is left, and nothing was written twice"
    assert made[0].certificate == "exact" and made[0].discarded == 0 and made[0].rank <= 16
    fields = json.loads((made[0].directory / "adapter_config.json").read_text())
    assert fields["r"] == made[0].rank and fields["peft_type"] == "LORA"
    torch.testing.assert_close(logits("it", made[0].directory), logits("0.5 * law + code"), atol=2e-5, rtol=1e-4)
    stamp = (made[0].directory / "adapter_model.safetensors").stat().st_mtime_ns
    assert Lowering(names(rank=16)).get("code + 0.5 * law").directory == made[0].directory
    assert (made[0].directory / "adapter_model.safetensors").stat().st_mtime_ns == stamp


def test_what_loses_too_much_or_has_no_weights_is_refused_once(names, monkeypatch):
    exact, loose = Lowering(names(rank=8)), Lowering(names(rank=8, max_discarded=0.9))
    with pytest.raises(KindError, match=r"local/tone@1.0.0 is no LoRA of rank 8.*left out"):
        exact.get("tone")
    monkeypatch.setattr(subprocess, "run", None)  # a second try would fail otherwise
    with pytest.raises(KindError, match="no LoRA of rank 8"):
        exact.get("tone")
    monkeypatch.undo()
    monkeypatch.setenv("HUB_HOME", str(exact.names.home))
    made = loose.get("tone")
    assert 0 < made.discarded <= 0.9 and "left out" in made.certificate
    with pytest.raises(KindError, match="no change of weights"):
        loose.get("lead")


def test_the_plugin_of_an_engine_that_is_not_here_is_never_imported():
    code = "import sys, router.upstream.names, router.upstream.lowered; print({'torch', 'vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()", "names are read without torch"
