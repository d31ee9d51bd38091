"""The laws of the loop, on a model small enough that each holds exactly or to rounding."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from train.data.batches import Dataset, Ragged
from train.errors import DataError, NonFiniteLoss, TrainError
from train.loop import fit
from train.method import Method
from train.result import FitResult
from train.steps.objective import loss_sum


def losses(result: FitResult) -> list[float]:
    return [record["loss"] for record in result.history if "loss" in record]


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def bit_equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_only_the_adapter(toy, ragged_lm, config):
    model, adapter = toy()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    result = fit(model, adapter, ragged_lm(), ragged_lm(seed=1), config(duration="10 epochs"))
    assert result.steps == result.total_steps == 10 * math.ceil(50 / 8)
    assert losses(result)[-1] < 0.3 * losses(result)[0]
    assert result.best["loss"] < 0.3 * math.log(23)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert not model.training


@pytest.mark.parametrize("micro", [1, 2, 3, 5, 8, 64])
def test_loss_and_update_do_not_depend_on_how_a_step_is_split(toy, ragged_lm, config, micro):
    """Rows have very unequal numbers of tokens, so a mean of means would differ at once."""
    data, runs = ragged_lm(20, longest=40), []
    for split in (None, micro):
        model, adapter = toy()
        result = fit(model, adapter, data, None, config(micro_batch=split, duration=6))
        runs.append((losses(result), state(adapter)))
    (whole, whole_state), (parts, parts_state) = runs
    assert parts == pytest.approx(whole, rel=1e-5)
    for name, value in whole_state.items():
        torch.testing.assert_close(parts_state[name], value, rtol=1e-4, atol=1e-6)


def test_the_reported_loss_is_the_mean_over_tokens_of_the_step(toy, ragged_lm, config):
    data = ragged_lm(8, longest=40)
    model, adapter = toy()
    batch = data.batch(torch.arange(8))
    with torch.no_grad():
        expected = float(loss_sum("causal_lm", model(batch["input_ids"]).logits, batch["labels"]) / data.items.sum())
    result = fit(model, adapter, data, None, config(micro_batch=3, duration=1))
    assert losses(result) == pytest.approx([expected], rel=1e-6)
    assert result.items == int(data.items.sum())


@pytest.mark.parametrize("changes", [{}, {"group_by_length": True}, {"optimizer": "adamw_8bit"}, {"patience": 50}])
@pytest.mark.parametrize("cut", [1, 5, 9])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(toy, ragged_lm, config, tmp_path, changes, cut):
    data, held = ragged_lm(), ragged_lm(seed=1)
    run = config(duration="2 epochs", eval_every=3, schedule="cosine", warmup=0.2, **changes)

    model, adapter = toy(dropout=0.2)
    straight = fit(model, adapter, data, held, run, out=tmp_path / "straight", save_every=4)

    class Interrupted(Exception):
        pass

    class Interrupt(Method):
        def after_step(self, adapter, step):
            if step == cut + 1:  # after the checkpoint of `cut`, so the work of one step is lost
                raise Interrupted

    first, adapter_1 = toy(dropout=0.2)
    with pytest.raises(Interrupted):
        fit(first, adapter_1, data, held, run, out=tmp_path / "cut", save_every=cut, method=Interrupt())
    torch.manual_seed(999)  # whatever the process drew before must not matter
    second, adapter_2 = toy(dropout=0.2)
    resumed = fit(second, adapter_2, data, held, run, out=tmp_path / "cut", save_every=cut, resume=True)

    assert bit_equal(state(adapter), state(adapter_2))
    assert second.forwards < model.forwards
    assert resumed.best == straight.best
    strip = [[{k: v for k, v in r.items() if k != "seconds"} for r in x.history] for x in (straight, resumed)]
    assert strip[0] == strip[1]
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == resumed.history


def test_resuming_another_run_is_refused_by_name(toy, ragged_lm, config, tmp_path):
    data = ragged_lm()
    fit(*toy(), data, None, config(duration=4), out=tmp_path, save_every=2)
    with pytest.raises(TrainError, match=r"lr was 0.02, is 0.01"):
        fit(*toy(), data, None, config(duration=4, lr=0.01), out=tmp_path, resume=True)
    with pytest.raises(TrainError, match="training data was"):
        fit(*toy(), ragged_lm(seed=5), None, config(duration=4), out=tmp_path, resume=True)
    with pytest.raises(TrainError, match="nothing to resume"):
        fit(*toy(), data, None, config(), out=tmp_path / "empty", resume=True)


def test_the_split_of_rows_may_change_on_resume(toy, ragged_lm, config, tmp_path, interrupt):
    data = ragged_lm()
    straight = toy()
    fit(*straight, data, None, config(duration=8))
    with pytest.raises(KeyboardInterrupt):
        fit(*toy(), data, None, config(duration=8), out=tmp_path, save_every=7, watch=interrupt(7))
    resumed = toy()
    fit(*resumed, data, None, config(duration=8, micro_batch=2), out=tmp_path, resume=True)
    for name, value in state(straight[1]).items():
        torch.testing.assert_close(state(resumed[1])[name], value, rtol=1e-4, atol=1e-6)


def test_evaluations_and_saving_change_nothing_that_is_learned(toy, ragged_lm, config, tmp_path):
    data, held = ragged_lm(), ragged_lm(seed=1)
    plain, watched = toy(dropout=0.3), toy(dropout=0.3)
    one = fit(*plain, data, None, config())
    two = fit(*watched, data, held, config(eval_every=2), out=tmp_path, save_every=3)
    assert losses(one) == losses(two)
    last = [r for r in two.history if "eval" in r][-1]
    assert last["step"] == two.total_steps
    if last["best"]:
        assert bit_equal(state(plain[1]), state(watched[1]))


def test_seeds_are_separate_streams(toy, ragged_lm, config):
    """Dropout does not move the data order, and the caller's random state is neither read nor moved."""
    data, orders = ragged_lm(), []

    class Watch(Method):
        def loss(self, model, batch, task):
            orders[-1].append(batch["input_ids"].tolist())
            return super().loss(model, batch, task)

    for dropout, caller in ((0.0, 1), (0.5, 2)):
        orders.append([])
        torch.manual_seed(caller)
        before = torch.get_rng_state()
        fit(*toy(dropout), data, None, config(), method=Watch())
        assert torch.equal(torch.get_rng_state(), before)
    assert orders[0] == orders[1]

    def trained(seed, caller):
        torch.manual_seed(caller)
        model, adapter = toy(dropout=0.5)
        fit(model, adapter, data, None, config(seed=seed))
        return state(adapter)

    assert bit_equal(trained(0, 1), trained(0, 2))
    assert not bit_equal(trained(0, 1), trained(1, 1))


def test_patience_counts_evaluations_whatever_is_saved(toy, ragged_lm, config, tmp_path):
    """On held-out rows of another rule every step makes things worse: the first evaluation stays the best."""
    random = torch.Generator().manual_seed(0)
    noise = [torch.randint(0, 23, (9,), generator=random).tolist() for _ in range(20)]
    held = Dataset({"input_ids": Ragged.of(noise)}, "causal_lm")
    stops = []
    for save_every, out in ((0, None), (1, tmp_path / "a"), (7, tmp_path / "b")):
        model, adapter = toy()
        run = config(duration=400, lr=0.1, eval_every=5, patience=3)
        result = fit(model, adapter, ragged_lm(), held, run, out=out, save_every=save_every)
        assert result.stopped == "patience"
        assert result.steps == result.best["step"] + 3 * 5
        stops.append(result.steps)
    assert len(set(stops)) == 1


def test_without_patience_it_never_stops_early_and_ends_in_the_best_state(toy, ragged_lm, config):
    random = torch.Generator().manual_seed(0)
    held = Dataset({"input_ids": Ragged.of(torch.randint(0, 23, (20, 9), generator=random).tolist())}, "causal_lm")
    model, adapter = toy()
    states = {}

    class Watch(Method):
        def after_step(self, adapter, step):
            states[step + 1] = state(adapter)

    result = fit(model, adapter, ragged_lm(), held, config(duration=60, lr=0.1, eval_every=5), method=Watch())
    assert (result.stopped, result.steps) == ("finished", 60)
    assert result.best["step"] < 60
    evaluations = [r for r in result.history if "eval" in r]
    assert result.best["loss"] == min(r["eval"]["loss"] for r in evaluations)
    assert bit_equal(state(adapter), states[result.best["step"]])


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_step_stops_keeps_the_best_and_says_where(toy, ragged_lm, config, tmp_path, where):
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("nan")

    class Break(Method):
        steps = 0

        def loss(self, model, batch, task):
            self.steps += 1
            value = super().loss(model, batch, task)
            if self.steps < 8:
                return value
            return value * float("inf") if where == "loss" else Poison.apply(value)

    model, adapter = toy()
    states = {}

    class Watch(Break):
        def after_step(self, adapter, step):
            states[step + 1] = state(adapter)

    run = config(duration=20, eval_every=3)
    with pytest.raises(NonFiniteLoss) as caught:
        fit(model, adapter, ragged_lm(), ragged_lm(seed=1), run, out=tmp_path, method=Watch())
    message = str(caught.value)
    assert "step 8 (epoch 2)" in message
    assert ("loss is inf" if where == "loss" else "gradient norm is nan") in message
    assert "of toy" in message
    best = caught.value.result.best
    assert f"the best state, of step {best['step']}" in message
    assert bit_equal(state(adapter), states[best["step"]])
    assert caught.value.result.stopped == "non-finite"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 7 + 2  # seven steps, two evaluations
    assert not model.training


def test_a_parameter_without_gradient_is_refused_by_name(toy, ragged_lm, config):
    model, adapter = toy()
    adapter.unused = nn.Parameter(torch.ones(3))
    before = state(adapter)
    with pytest.raises(TrainError, match="1 of 4 parameters get no gradient: unused"):
        fit(model, adapter, ragged_lm(), None, config())
    assert bit_equal(state(adapter), before)


def test_an_adapter_outside_the_model_or_frozen_is_refused(toy, ragged_lm, config):
    model, _ = toy()
    model.adapter.requires_grad_(False)
    with pytest.raises(TrainError, match="3 of 3 parameters get no gradient"):
        fit(model, toy()[1], ragged_lm(), None, config())
    with pytest.raises(TrainError, match="no parameter that requires a gradient"):
        fit(model, model.adapter, ragged_lm(), None, config())


def test_data_that_train_nothing_are_refused(toy, config):
    ids = Ragged.of([[1, 2, 3]])
    with pytest.raises(DataError, match="masked"):
        fit(*toy(), Dataset({"input_ids": ids, "labels": Ragged.of([[-100] * 3])}, "causal_lm"), None, config())
    with pytest.raises(DataError, match="no rows"):
        fit(
            *toy(),
            Dataset({"input_ids": ids}, "causal_lm"),
            Dataset({"input_ids": Ragged.of([])}, "causal_lm"),
            config(),
        )


def test_clipping_bounds_the_update_and_zero_does_not_clip(toy, ragged_lm, config):
    updates = {}
    for clip in (0.0, 1e-4):
        model, adapter = toy()

        class Watch(Method):
            def after_step(self, adapter, step, clip=clip):
                updates[clip] = math.sqrt(sum(float(p.grad.square().sum()) for p in adapter.parameters()))

        result = fit(model, adapter, ragged_lm(), None, config(duration=1, clip=clip), method=Watch())
    assert updates[1e-4] == pytest.approx(1e-4, rel=1e-3)
    assert updates[0.0] == pytest.approx(result.history[0]["grad_norm"], rel=1e-5)


def test_bf16_learns_and_keeps_the_adapter_in_fp32(toy, ragged_lm, config):
    model, adapter = toy()
    result = fit(model, adapter, ragged_lm(), ragged_lm(seed=1), config(duration="10 epochs", precision="bf16"))
    assert losses(result)[-1] < 0.5 * losses(result)[0]
    assert all(p.dtype == torch.float32 for p in adapter.parameters())


def test_gradient_checkpointing_needs_a_model_that_can(toy, ragged_lm, config):
    with pytest.raises(TrainError, match="ToyLM cannot checkpoint gradients"):
        fit(*toy(), ragged_lm(), None, config(gradient_checkpointing=True))


def test_checkpoints_need_a_folder(toy, ragged_lm, config):
    with pytest.raises(TrainError, match="need a folder"):
        fit(*toy(), ragged_lm(), None, config(), save_every=2)


def test_logits_of_another_shape_are_explained(toy, ragged_lm, config):
    model, adapter = toy()
    data = ragged_lm(4)
    rows = Dataset({"input_ids": data.tokens, "labels": torch.tensor([0, 1, 0, 1])}, "classification")
    with pytest.raises(TrainError, match="task classification: labels have shape"):
        fit(model, adapter, rows, None, config())


def test_a_given_display_is_joined_and_left(toy, ragged_lm, config):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    seen = []

    class Watch(Method):
        def after_step(self, adapter, step):
            seen.append([(task.completed, task.total, task.fields["status"]) for task in progress.tasks])

    with Progress(console=console) as progress:
        result = fit(*toy(), ragged_lm(), None, config(), progress=progress, method=Watch())
        assert progress.tasks == []
    assert seen[5] == [(5, 12, f"loss {losses(result)[4]:.3f}")]


def test_nothing_is_printed_in_a_pipe(toy, ragged_lm, config, capfd):
    fit(*toy(), ragged_lm(), ragged_lm(seed=1), config())
    assert capfd.readouterr() == ("", "")
