"""What is asked of a base: one table of quantizations, and every command that takes one reads it."""

import subprocess
import sys
from typing import get_args

import click
import pytest

from compose.base.request import QUANTIZATIONS, TASKS, BaseRequest, Quantization
from hub.cli import main
from hub.errors import UsageError


def commands(command: click.Command, path: str) -> list[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        return [(path, command)]
    context = click.Context(command)
    inner = [(name, command.get_command(context, name)) for name in command.list_commands(context)]
    return [pair for name, found in inner if found is not None for pair in commands(found, f"{path} {name}")]


def test_every_command_takes_the_quantizations_of_the_table() -> None:
    choices = {
        path: tuple(option.type.choices)
        for path, command in commands(main, "hub")
        for option in command.params
        if option.name == "quantize" and isinstance(option.type, click.Choice)
    }
    assert {"hub run", "hub serve", "hub export", "hub verify", "hub eval", "hub compose check"} <= choices.keys()
    assert set(choices.values()) == {tuple(QUANTIZATIONS)} == {get_args(Quantization)}


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"quantize": "int9"}, "did you mean int8"),
        ({"task": "casual_lm"}, "did you mean causal_lm"),
        ({"dtype": "bf61"}, "did you mean bf16"),
    ],
)
def test_what_is_not_known_is_refused_with_what_is_near(asked: dict[str, str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        BaseRequest(**asked)  # type: ignore[arg-type]


def test_a_request_is_checked_without_torch() -> None:
    code = (
        "import sys; from compose.base.request import BaseRequest\n"
        f"for task in {list(TASKS)}: BaseRequest(task=task, dtype='bf16', quantize='nf4')\n"
        "print([m for m in ('torch', 'transformers', 'bitsandbytes') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
