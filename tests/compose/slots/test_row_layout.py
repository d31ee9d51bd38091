"""What a layout does to an input and takes back from an output, and what trial calls tell of it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from compose.errors import KindError
from compose.runtime.trial_findings import Runs, Trial, find, find_positions, find_states, sample
from compose.runtime.trial_inputs import Sizes
from compose.slots.row_layout import ROWS_FIRST, RowLayout

MANY, FEW = Sizes(3, 11), Sizes(2, 13)


@dataclass
class At:
    path: str = "layer"
    on_features: bool = True


LAYOUTS = {
    "rows, tokens": (ROWS_FIRST, (3, 5, 4)),
    "rows": (ROWS_FIRST, (3, 4)),
    "rows, height, width": (ROWS_FIRST, (3, 2, 5, 4)),
    "tokens, rows": (RowLayout(1), (5, 3, 4)),
    "rows of tokens": (RowLayout(counts=frozenset(), by_token=True), (15, 4)),
    "windows of rows": (RowLayout(counts=frozenset({2})), (6, 5, 4)),
}


@pytest.mark.parametrize("what", LAYOUTS)
def test_there_and_back(what):
    layout, shape = LAYOUTS[what]
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    rows = layout.rows_first(x, 3, (5,), At())
    assert rows.dim() == 3
    assert len(rows) % 3 == 0
    assert torch.equal(layout.back(rows, x, At()), x)
    of_a_row = x.transpose(0, layout.dim).reshape(3, -1)
    assert torch.equal(rows.reshape(3, -1), of_a_row)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (ROWS_FIRST, (4, 5, 8)),
        (ROWS_FIRST, (6, 5, 8)),  # a whole multiple, but one entry a row was seen
        (ROWS_FIRST, (15, 8)),
        (RowLayout(1), (3, 5, 8)),
        (RowLayout(counts=frozenset(), by_token=True), (12, 8)),
        (RowLayout(counts=frozenset({2})), (9, 5, 8)),
        (RowLayout(windows=True), (7, 5, 8)),
    ],
)
def test_other_numbers_of_entries_are_refused(layout, shape):
    with pytest.raises(KindError, match=f"{shape[layout.dim]} entries come to layer for 3 rows"):
        layout.rows_first(torch.zeros(shape), 3, (5,), At())


# -- trial calls of layers that lay out their rows in every way -----------------------------------------------------


def numbers(sizes, *, changed=()):
    """(rows, tokens, 6), other numbers in the rows that are changed."""
    x = torch.randn(sizes.rows, sizes.length, 6, generator=torch.Generator().manual_seed(sizes.rows))
    for i in changed:
        x[i] += 1 + torch.rand(sizes.length, 6)
    return x


def tried(*layers, other=None):
    """What is found at a module that gets ``layer(x)``, call by call, with the trial's five inputs."""
    given = numbers(MANY), numbers(MANY, changed=[0]), numbers(MANY, changed=[1]), numbers(MANY), numbers(FEW)
    beside = (torch.zeros(6),) * 3 + (torch.ones(6), torch.zeros(6)) if other else (torch.zeros(6),) * 5
    seen = [
        [sample(layer(x, b) if other else layer(x)) for layer in layers] for x, b in zip(given, beside, strict=True)
    ]
    return find(Runs(*seen), Trial(MANY, FEW, text=True))


def gathered(x):
    """The tokens that an expert takes, in order."""
    flat = x.flatten(0, 1)
    return flat[flat[:, 0] > 0]


FOUND = {
    "rows first": (lambda x: x, ROWS_FIRST),
    "pooled": (lambda x: x.mean(1), RowLayout(tokens=False)),
    "tokens first": (lambda x: x.transpose(0, 1), RowLayout(1)),
    "flattened": (lambda x: x.flatten(0, 1), RowLayout(counts=frozenset(), by_token=True)),
    "one token less": (lambda x: x[:, 1:], RowLayout(tokens=False)),
    "padded": (lambda x: torch.nn.functional.pad(x, (0, 0, 0, 1)), RowLayout(tokens=False)),
    "two heads": (lambda x: x.repeat_interleave(2, 0), RowLayout(counts=frozenset({2}), tokens=False)),
    "tokens as rows": (lambda x: x.reshape(-1, 1, 6), RowLayout(counts=frozenset({11}), windows=True, tokens=False)),
    "learned queries": (lambda x: torch.ones(1, 4, 6).expand(len(x), -1, -1), RowLayout(tokens=False)),
    "ids": (lambda x: (x[..., 0] * 1000).long(), ROWS_FIRST),
    "gathered": (gathered, "takes the tokens of all rows together"),
    "interleaved": (lambda x: x.transpose(0, 1).flatten(0, 1), "takes the tokens of all rows together"),
    "repeated": (lambda x: x.repeat(2, 1, 1), "gets what is made of several rows"),
    "mixed": (lambda x: x + x.mean(0, keepdim=True), "gets what is made of several rows"),
    "positions": (lambda x: torch.arange(6.0 * x.shape[1]).reshape(1, -1, 6), "gets one input for all rows"),
}


@pytest.mark.parametrize("what", FOUND)
def test_where_rows_stand_is_found(what):
    layer, expected = FOUND[what]
    assert tried(layer) == expected


def test_calls_of_one_module_must_agree():
    def first(x):
        return x

    assert tried(first, first) == ROWS_FIRST
    assert tried(first, FOUND["positions"][0]) == "is called with rows in one place, then in another"
    assert tried(first, FOUND["tokens first"][0]) == "is called with rows in one place, then in another"
    assert tried(first, lambda x: x.mean(1)) == RowLayout(tokens=False)


def test_what_comes_from_another_input():
    assert tried(lambda x, b: b.expand(len(x), 4, 6), other=True) == "gets an input that is not the text's"
    assert tried(lambda x, b: x + b, other=True) == ROWS_FIRST


def test_rounding_is_no_movement():
    noise = torch.Generator().manual_seed(0)
    found = tried(lambda x: x * (1 + 1e-6 * torch.rand(x.shape, generator=noise)))
    assert found == ROWS_FIRST


def test_states_of_all_blocks_are_alike():
    plain, padded = numbers(MANY), torch.zeros(3, 12, 6)
    changed, second = numbers(MANY, changed=[0]), numbers(MANY, changed=[1])
    runs = Runs([plain] * 2, [changed] * 2, [second] * 2, [plain] * 2, [numbers(FEW)] * 2)
    assert find_states(runs, Trial(MANY, FEW, text=True), {6}) == ROWS_FIRST
    assert isinstance(find_states(runs, Trial(MANY, FEW, text=True), {6, 12}), str)
    runs = Runs(*([states, torch.cat([states, padded[: len(states), :1]], 1)] for (states, _) in runs))
    assert isinstance(find_states(runs, Trial(MANY, FEW, text=True), {6}), str)


@pytest.mark.parametrize(
    ("ids", "whole"),
    [
        (lambda s: torch.arange(s.length), True),
        (lambda s: torch.arange(s.length)[None], True),
        (lambda s: torch.arange(s.length).expand(s.rows, -1), True),
        (lambda s: torch.arange(s.length).expand(3, s.rows, -1), True),  # of time, height and width
        (lambda s: torch.arange(s.length)[:, None], False),
        (lambda s: torch.arange(s.rows * s.length), False),
    ],
)
def test_position_ids(ids, whole):
    of = {sizes: [sample(ids(sizes))] for sizes in (MANY, FEW)}
    found = find_positions(Runs(of[MANY], of[MANY], of[MANY], of[MANY], of[FEW]), Trial(MANY, FEW, text=True))
    assert (found == ROWS_FIRST) == whole
