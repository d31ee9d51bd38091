"""What a command may import. How long it takes is measured by tests/benchmarks/bench_cli_start.py."""

import os
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "numpy", "networkx", "pydantic", "rich", "huggingface_hub", "matplotlib", "filelock"}
PROBE = """
import sys
from hub.cli import main
try:
    main({arguments!r})
except SystemExit as done:
    assert not done.code, done.code
print(*sorted(set(sys.modules) & set({heavy!r})), file=sys.stderr)
"""


def imported(*arguments: str) -> set[str]:
    code = PROBE.format(arguments=list(arguments), heavy=sorted(HEAVY))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=True
    )
    return set(done.stderr.splitlines()[-1].split())


def test_help_imports_no_command() -> None:
    assert imported("--help") == set()


@pytest.mark.parametrize("arguments", [("list",), ("list", "--json"), ("list", "--newest", "--sort", "created")])
def test_list_reads_the_index_alone(publish, hub_home, packed, arguments) -> None:
    from hub.store import Store

    Store(hub_home).put(packed()[0])
    assert imported(*arguments) == set()


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (("show", "acme/tone"), {"pydantic"}),
        (("verify",), {"pydantic", "numpy"}),
        (("tag", "acme/tone@1.0.0", "prod"), {"pydantic", "filelock"}),
    ],
)
def test_no_command_of_hub_imports_torch(hub_home, packed, arguments, allowed) -> None:
    from hub.store import Store

    Store(hub_home).put(packed()[0])
    assert imported(*arguments) <= allowed


@pytest.mark.parametrize("package", ["hub", "hub.errors", "hub.ref", "hub.remotes"])
def test_import_is_cheap(package: str) -> None:
    code = f"import sys, {package}; print(*sorted(set(sys.modules) & set({sorted(HEAVY)!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
