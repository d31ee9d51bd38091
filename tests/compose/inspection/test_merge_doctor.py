"""The doctor: merges made by PEFT itself are recomputed, and each mistake is told by its name."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from compose.errors import KindError
from compose.inspection.merge_doctor import Diagnosis, examine
from compose.planning.members import AdapterFinder
from hub.errors import HubError, NotFound, UsageError

Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Directories a, b and the merges of them that PEFT saves: name -> (weights, options of add_weighted_adapter)."""
    kept: dict[str, Path] = {}

    def make(key: str, config: dict[str, Any], merges: dict[str, Any], kind: str = "lora") -> Path:
        if key in kept:
            return kept[key]
        root = kept[key] = tmp_path_factory.mktemp(key)
        tiny.model("llama").save_pretrained(root / "base")
        targets = ["q_proj", "v_proj"] if kind == "lora" else ["k_proj", "down_proj"]
        cls = peft.LoraConfig if kind == "lora" else peft.IA3Config
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fields = {"target_modules": targets, "task_type": "CAUSAL_LM", **config}
            model = peft.get_peft_model(tiny.model("llama"), cls(**fields), adapter_name="one")
            model.add_adapter("two", cls(**fields))
            generator = torch.Generator().manual_seed(0)
            for name, parameter in model.named_parameters():
                if "lora_" in name or "ia3_l" in name:
                    parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
            for name, (weights, options) in merges.items():
                model.add_weighted_adapter(["one", "two"], weights, name, **options)
            model.save_pretrained(root)
        for directory in ("one", "two", *merges):
            path = root / directory / "adapter_config.json"
            fields = json.loads(path.read_text())
            path.write_text(json.dumps({**fields, "base_model_name_or_path": str(root / "base")}))
        return root

    return make


LORA = {"r": 4, "lora_alpha": 8}
MERGES = {
    name: ([0.7, 0.3], {"combination_type": name, **options})
    for name, options in {
        "linear": {},
        "cat": {},
        "svd": {"svd_rank": 4},
        "ties": {"density": 0.3},
        "ties_svd": {"density": 0.3, "svd_rank": 4},
        "magnitude_prune": {"density": 0.3},
        "magnitude_prune_svd": {"density": 0.3, "svd_rank": 4},
        "dare_linear": {"density": 0.5},
    }.items()
}


def look(root: Path, result: str, weights: list[float] | None = None, **options: Any) -> Diagnosis:
    members = [str(root / "one"), str(root / "two")]
    return examine(str(root / result), members, AdapterFinder(), weights=weights or [0.7, 0.3], **options)


def delta(directory: Path, path: str) -> torch.Tensor:
    """S B A at a module, by the book."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{path}.lora_{x}.weight"].double() for x in "AB")
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    return scale * b @ a


@pytest.mark.parametrize("result", ["linear", "cat", "svd", "ties", "magnitude_prune", "dare_linear"])
def test_errors_are_those_of_the_matrices(result: str, made: Made) -> None:
    root = made("lora", LORA, MERGES)
    found = look(root, result)
    gap = whole = 0.0
    assert len(found.sites) == 4
    for site in found.sites:
        exact = 0.7 * delta(root / "one", site.path) + 0.3 * delta(root / "two", site.path)
        got = delta(root / result, site.path)
        assert site.error == pytest.approx(float((got - exact).norm() / exact.norm()), abs=1e-9)
        assert site.norm == pytest.approx(float(exact.norm()))
        assert site.cosine == pytest.approx(float((got * exact).sum() / got.norm() / exact.norm()))
        gap += float((got - exact).square().sum())
        whole += float(exact.square().sum())
    assert found.error == pytest.approx(math.sqrt(gap / whole), abs=1e-9)
    assert found.sound == (result == "cat")


def test_peft_linear_is_wrong_and_why(made: Made) -> None:
    found = look(made("lora", LORA, MERGES), "linear")
    assert found.error > 0.5
    assert "apart" in str(found.recipe)
    assert '"linear"' in str(found.recipe)
    assert found.recipe_error < 1e-6
    assert found.unexplained > 0.3
    assert any("cross terms" in finding for finding in found.findings)
    assert found.remedy.startswith("hub compose 'cat(")


def test_peft_cat_is_right(made: Made) -> None:
    found = look(made("lora", LORA, MERGES), "cat")
    assert found.error < 1e-7
    assert found.findings == ()
    assert found.fitted == pytest.approx((0.7, 0.3))
    assert found.unexplained < 1e-6


@pytest.mark.parametrize(
    ("result", "density", "recipe"),
    [
        ("svd", None, '"svd"'),
        ("ties", 0.3, 'apart, PEFT\'s "ties"'),
        ("magnitude_prune", 0.3, 'apart, PEFT\'s "magnitude_prune"'),
        ("ties_svd", 0.3, '"ties_svd"'),
        ("magnitude_prune_svd", 0.3, '"magnitude_prune_svd"'),
    ],
)
def test_recipes_are_recognised(result: str, density: float | None, recipe: str, made: Made) -> None:
    found = look(made("lora", LORA, MERGES), result, density=density)
    assert recipe in str(found.recipe)
    assert found.recipe_error < 1e-4


def test_what_was_drawn_at_random_matches_no_recipe(made: Made) -> None:
    assert look(made("lora", LORA, MERGES), "dare_linear", density=0.5).recipe is None


def test_ties_of_the_changes_is_sound_where_its_rank_suffices(made: Made) -> None:
    full = {"full": ([0.7, 0.3], {"combination_type": "ties_svd", "density": 0.3, "svd_rank": 16})}
    root = made("full", {**LORA, "target_modules": ["v_proj"]}, full)
    assert look(root, "full", method="ties", density=0.3).sound
    assert not look(root, "full").sound  # it is no weighted sum


def test_rslora_kept_in_the_result_is_a_factor(made: Made) -> None:
    merges = {"cat": ([0.7, 0.3], {"combination_type": "cat"}), "svd": ([0.7, 0.3], {"combination_type": "svd"})}
    root = made("rs", {**LORA, "use_rslora": True}, merges)
    found = look(root, "cat")
    assert found.error == pytest.approx(math.sqrt(8) - 1, rel=1e-4)
    assert found.findings[0] == "it is the exact merge times 2.828"
    assert found.findings[1].startswith("sqrt(8): its factors were made for a scale of 1")
    fields = json.loads((root / "cat" / "adapter_config.json").read_text())
    (root / "cat" / "adapter_config.json").write_text(json.dumps({**fields, "use_rslora": False}))
    assert look(root, "cat").sound  # what the finding said would mend it


def test_dora_needs_its_base_and_loses_its_magnitudes_in_peft(made: Made) -> None:
    root = made("dora", {**LORA, "use_dora": True}, {"svd": ([0.5, 0.5], {"combination_type": "svd", "svd_rank": 8})})
    found = look(root, "svd", [0.5, 0.5])
    assert 0.1 < found.error < 2
    assert any("magnitudes" in finding for finding in found.findings)
    same = examine(str(root / "one"), [str(root / "one")], AdapterFinder(), weights=[1.0])
    assert same.error < 1e-6


def test_gains_added_without_their_neutral_one(made: Made) -> None:
    merges = {"mean": ([0.5, 0.5], {}), "sum": ([1.0, 1.0], {})}
    root = made("ia3", {"feedforward_modules": ["down_proj"]}, merges, "ia3")
    assert look(root, "mean", [0.5, 0.5]).sound
    found = look(root, "sum", [1.0, 1.0])
    assert not found.sound
    assert "neutral" in str(found.recipe)
    assert any("nothing is 1" in finding for finding in found.findings)


def edited(root: Path, name: str, out: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    out.mkdir()
    (out / "adapter_config.json").write_text((root / name / "adapter_config.json").read_text())
    save_file(change(load_file(root / name / "adapter_model.safetensors")), out / "adapter_model.safetensors")
    return str(out)


def test_a_mean_that_was_divided_twice(made: Made, tmp_path: Path) -> None:
    root = made("lora", LORA, {**MERGES})
    halves = edited(
        root, "cat", tmp_path / "halved", lambda t: {k: v / 2 if "lora_B" in k else v for k, v in t.items()}
    )
    found = look(root, halves)
    assert found.findings[0] == "it is the exact merge times 0.5"
    assert "divided by 2 once more" in found.findings[1]
    assert found.fitted == pytest.approx((0.35, 0.15))
    other = look(root, "cat", [0.5, 0.5])
    assert other.findings == ("it is the exact sum with other weights: 0.7, 0.3",)


def test_sites_that_are_missing_or_too_many_are_named(made: Made, tmp_path: Path) -> None:
    root = made("lora", LORA, MERGES)
    first = "model.layers.0.self_attn.q_proj"
    lost = edited(root, "cat", tmp_path / "lost", lambda t: {k: v for k, v in t.items() if first not in k})
    found = look(root, lost)
    assert found.findings[0] == f"it does nothing at {first}, where its members act"
    members = [lost, lost]
    extra = examine(str(root / "cat"), members, AdapterFinder(), weights=[0.5, 0.5])
    assert extra.findings[0] == f"it acts at {first}, where no member does"


def test_kinds_without_factors_are_averaged_as_they_are(tiny: Any, tmp_path: Path) -> None:
    from compose.formats.directory import save_adapter

    model = tiny.model("llama")
    for name in ("one", "two"):
        adapter = tiny.adapter(model, "bottleneck", name, seed=len(name) + ord(name[0]))
        save_adapter(adapter, tmp_path / name, model.moduloom.sites)
    states = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two")]
    for name, factor in (("mean", 0.5), ("twice", 0.25)):
        mean = {key: factor * (states[0][key] + states[1][key]) for key in states[0]}
        edited(tmp_path, "one", tmp_path / name, lambda _, mean=mean: mean)
    assert look(tmp_path, "mean", [0.5, 0.5]).error < 1e-6
    assert "divided by 2 once more" in look(tmp_path, "twice", [0.5, 0.5]).findings[1]


def test_what_cannot_be_examined_is_said(made: Made, tmp_path: Path) -> None:
    root = made("lora", LORA, MERGES)
    gains = made("ia3", {"feedforward_modules": ["down_proj"]}, {"mean": ([0.5, 0.5], {})}, "ia3")
    one, cat = str(root / "one"), str(root / "cat")
    broken = edited(
        root, "one", tmp_path / "b", lambda t: {k: v for k, v in t.items() if "0.self_attn.q_proj.lora_A" not in k}
    )
    narrow = edited(root, "one", tmp_path / "n", lambda t: {k: v[..., :8].contiguous() for k, v in t.items()})
    for members, options, error, says in (
        ([one], {"weights": [0.5, 0.5]}, UsageError, "1 members and 2 weights"),
        ([], {}, UsageError, "has members"),
        ([one], {"method": "dare"}, UsageError, "at random"),
        ([one], {"method": "knots"}, UsageError, "not recomputed"),
        ([one], {"method": "ties"}, UsageError, "density"),
        ([one], {"method": "tis"}, HubError, "unknown function 'tis'"),
        ([one], {"method": "ensemble.mean"}, UsageError, "merges no parameters"),
        ([one, str(gains / "one")], {}, KindError, "is ia3"),
        ([one, str(tmp_path / "nowhere")], {}, NotFound, "no directory"),
        ([one, broken], {}, KindError, "not the other factor"),
        ([one, narrow], {}, KindError, "pair|shape"),
    ):
        with pytest.raises(error, match=says):
            examine(cat, members, AdapterFinder(), **options)  # type: ignore[arg-type]
