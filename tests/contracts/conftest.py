"""The grid of the contract tests: every registered kind x family x dtype, and what they compare with.

A kind that cannot work on a family refuses it with a KindError or SiteError. Such pairs stand in ``REFUSALS``; they
leave the grid, and ``test_contract_coverage.py`` checks that they are refused, so a change either way is noticed.
"""

from __future__ import annotations

from typing import Any

import pytest

# (kind, family): every kind works on all eight families.
REFUSALS: frozenset[tuple[str, str]] = frozenset()


def pytest_generate_tests(metafunc):
    """Spread tests over the grid by the fixtures they ask for (``decoder``: the families that generate text)."""
    wanted = [name for name in ("kind", "family", "decoder", "dtype") if name in metafunc.fixturenames]
    if not wanted:
        return
    from compose.kind.registry import kinds

    tiny = _tiny_class(metafunc.config)
    axes = {"kind": tuple(kinds()), "family": tiny.families, "decoder": tiny.decoding, "dtype": tiny.dtypes}
    grid: list[tuple[str, ...]] = [()]
    for name in wanted:
        grid = [(*point, value) for point in grid for value in axes[name]]
    if wanted[0] == "kind":
        grid = [point for point in grid if point[:2] not in REFUSALS]
    points = [pytest.param(*point, id="-".join(point)) for point in grid]
    metafunc.parametrize(wanted, points)


def _tiny_class(config: pytest.Config) -> Any:
    (home,) = [p for p in config.pluginmanager.get_plugins() if hasattr(p, "Tiny")]
    return home.Tiny


@pytest.fixture
def refusals():
    return REFUSALS


@pytest.fixture
def photograph():
    """Everything a model is: tree, classes, attributes, parameters, flags, buffers, hooks, keys, attention."""

    def take(model: Any) -> dict[str, Any]:
        seen: dict[str, Any] = {"keys": list(model.state_dict())}
        for path, module in model.named_modules():
            own = {k: v for k, v in module.__dict__.items() if not k.startswith("_")}
            hooks = [len(v) for k, v in sorted(module.__dict__.items()) if k.endswith("_hooks")]
            seen[f"module {path}"] = (type(module), sorted(own), hooks, module.training)
            seen[f"attention {path}"] = getattr(getattr(module, "config", None), "_attn_implementation", None)
        tensors = [("parameter", n, p) for n, p in model.named_parameters(remove_duplicate=False)]
        tensors += [("buffer", n, b) for n, b in model.named_buffers(remove_duplicate=False)]
        for what, name, tensor in tensors:
            seen[f"{what} {name}"] = (id(tensor), tensor.requires_grad, tensor.dtype)
            seen[f"{what} {name} values"] = tensor.detach().clone()
        return seen

    return take


@pytest.fixture
def same_photograph():
    import torch

    def check(before: dict[str, Any], after: dict[str, Any], *, flags: bool = True) -> None:
        assert before.keys() == after.keys()
        for what, value in before.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, after[what]), f"{what} changed"
            elif flags or not isinstance(value, tuple):
                assert value == after[what], f"{what}: {value} became {after[what]}"

    return check
