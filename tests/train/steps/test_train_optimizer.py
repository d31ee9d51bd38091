from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from train.errors import TrainError
from train.learner.sparsify import start_again
from train.method import Method
from train.steps.checkpoint import read_checkpoint, write_checkpoint
from train.steps.optimizer import learning_rate, make_optimizer


def rates(config, total):
    return [learning_rate(config, step, total) for step in range(total)]


def test_schedules_rise_to_the_peak_and_never_waste_a_step(config):
    for schedule in ("constant", "linear", "cosine"):
        curve = rates(config(schedule=schedule, warmup=0.2, lr=1.0), 50)
        assert curve[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
        assert curve[10] == max(curve) == 1.0
        assert min(curve) > 0
        past = curve[10:]
        assert past == sorted(past, reverse=True)
    assert rates(config(schedule="constant", lr=0.5), 9) == [0.5] * 9


def test_linear_and_cosine_at_known_points(config):
    assert rates(config(schedule="linear", lr=1.0), 4) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert rates(config(schedule="cosine", lr=1.0), 4)[2] == pytest.approx(0.5)


def test_a_second_phase_has_the_schedule_from_its_peak_again(config):
    run = config(schedule="linear", warmup=0.1, lr=0.4)
    module = nn.Linear(2, 2)
    optimizer = make_optimizer(run, [{"params": [module.weight]}, {"params": [module.bias], "lr_scale": 5.0}])
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    start_again(optimizer, [module.weight], run, 20, 40)
    assert list(optimizer.state) == [module.bias]
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    second = [scales[0] * learning_rate(run, step, 40) for step in range(20, 40)]
    assert second == pytest.approx([0.4 * (1 - i / 20) for i in range(20)])
    assert scales[1] == pytest.approx(5 * scales[0])
    start_again(optimizer, [module.weight], run, 20, 40, 3.0)
    again = [group["lr_scale"] for group in optimizer.param_groups]
    assert again == pytest.approx([3 * scales[0] ** 2, scales[1] * scales[0]])  # a head keeps its own rate
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    for step in (2, 40):  # the rate has not begun to fall; nothing comes after
        start_again(optimizer, [], run, step, 40)
    assert [group["lr_scale"] for group in optimizer.param_groups] == scales


def test_weight_decay_shrinks_matrices_only(config):
    module = nn.Linear(5, 3)
    optimizer = make_optimizer(config(weight_decay=0.5, lr=0.1), Method().groups(module, config(weight_decay=0.5)))
    before = module.weight.detach().clone(), module.bias.detach().clone()
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(module.weight.detach(), before[0] * (1 - 0.1 * 0.5))
    torch.testing.assert_close(module.bias.detach(), before[1])


def test_paged_on_a_cpu_says_so_once_and_makes_the_same_update(config, caplog):
    weights = []
    for name in ("adamw", "paged_adamw_32bit"):
        torch.manual_seed(0)
        module = nn.Linear(64, 64)
        with caplog.at_level(logging.WARNING):
            optimizer = make_optimizer(config(optimizer=name), Method().groups(module, config()))
        for _ in range(3):
            optimizer.zero_grad()
            module(torch.ones(2, 64)).square().sum().backward()
            optimizer.step()
        weights.append(module.weight.detach())
    assert len(caplog.records) == 1
    assert "paged_adamw_32bit needs a GPU" in caplog.text
    assert torch.equal(*weights)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_optimizer_state_survives_a_checkpoint_bit_for_bit(config, tmp_path, name):
    def fresh():
        torch.manual_seed(0)
        module = nn.Linear(128, 64)  # 8,192 weights: large enough that bitsandbytes keeps 8-bit state
        return module, make_optimizer(config(optimizer=name), Method().groups(module, config()))

    def step(module, optimizer, value):
        optimizer.zero_grad()
        module(torch.full((2, 128), value)).square().sum().backward()
        optimizer.step()

    module, optimizer = fresh()
    for value in (0.1, -0.3, 0.2):
        step(module, optimizer, value)
    path = tmp_path / "state.safetensors"
    write_checkpoint(path, {"module": module.state_dict(), "optimizer": optimizer.state_dict()})
    other, other_optimizer = fresh()
    state = read_checkpoint(path)
    other.load_state_dict(state["module"])
    other_optimizer.load_state_dict(state["optimizer"])
    for pair in ((module, optimizer), (other, other_optimizer)):
        step(*pair, 0.5)
    assert torch.equal(module.weight, other.weight)
    if name == "adamw_8bit":
        assert optimizer.state[module.weight]["state1"].dtype == torch.uint8


def test_a_checkpoint_keeps_shared_memory_nesting_and_odd_keys_apart(tmp_path):
    one = torch.arange(6.0)
    state = {"a": one, "view": one[2:4], "again": one, "n": {0: {"x": [1, None, True, 0.1, "s"]}, 3: {}}, "none": None}
    write_checkpoint(tmp_path / "c", state)
    back = read_checkpoint(tmp_path / "c")
    assert torch.equal(back["view"], one[2:4])
    assert torch.equal(back["again"], one)
    assert back["n"] == state["n"]
    assert back["none"] is None


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / "c"
    write_checkpoint(path, {"a": torch.arange(100.0)})
    whole = path.read_bytes()
    for bad in (whole[:-7], whole[:20], b"", b"\x80\x04pickle", whole.replace(b'"state"', b'"stale"')):
        path.write_bytes(bad)
        with pytest.raises(TrainError, match="not a whole checkpoint"):
            read_checkpoint(path)


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    """The write fails half way, as it does with ENOSPC; the file limit makes the kernel refuse it for real."""
    import resource
    import signal

    path = tmp_path / "c"
    write_checkpoint(path, {"a": torch.arange(10.0)})
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(TrainError, match="previous checkpoint is intact") as caught:
            write_checkpoint(path, {"a": torch.arange(100_000.0)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.path == str(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
