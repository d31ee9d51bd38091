"""The faces of the four packages: every name is there, and naming a package costs nothing."""

import importlib
import subprocess
import sys

import pytest

from hub.cli import COMMANDS
from hub.lazy import load

PACKAGES = ("hub", "compose", "router", "train")
PYTHON = {  # of every command: its functions
    "quickstart": ["train.quickstart.story:run"],
    "doctor": ["hub:doctor"],
    "push": ["hub:push"],
    "pull": ["hub:pull"],
    "list": ["hub.store:Store.list"],
    "search": ["hub.store:Store.search"],
    "show": ["hub.store:Store.get"],
    "diff": ["hub:diff"],
    "tree": ["hub:tree"],
    "import": ["hub:import_"],
    "export": ["hub:export", "compose:export"],
    "verify": ["hub:verify"],
    "sign": ["hub:sign"],
    "tag": ["hub:tag"],
    "untag": ["hub:untag"],
    "yank": ["hub:yank", "hub:unyank"],
    "delete": ["hub:delete"],
    "lock": ["hub:lock"],
    "sync": ["hub:sync"],
    "outdated": ["hub:outdated"],
    "remote": ["hub:Remotes"],
    "gc": ["hub:gc"],
    "registry": ["hub.registry.app:create_app"],
    "train": ["train:run", "train:preview"],
    "few-shot": ["train:few_shot", "train.fewshot:load", "train.fewshot:show"],
    "methods": ["train:describe_methods"],
    "race": ["train:race"],
    "eval": ["train:evaluate"],
    "compose": [
        *("compose:check", "compose:explain", "compose:describe_sites", "compose:describe_kinds"),
        *("compose:describe_functions", "compose:interference", "compose:diagnose"),
        *("compose:publish", "compose:publish_merge"),
    ],
    "route": ["router:fit", "router:add", "router:evaluate", "router:explain", "router:rank"],
    "run": ["router:run"],
    "serve": ["router.serving.app:create_app"],
}


def test_every_command_has_its_python() -> None:
    assert set(PYTHON) == {name for rows in COMMANDS.values() for name in rows}
    for target in (target for targets in PYTHON.values() for target in targets):
        module, _, name = target.partition(":")
        first, _, method = name.partition(".")
        found = load(f"{module}:{first}")
        assert callable(getattr(found, method) if method else found), target


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_of_a_face_is_there(package: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) <= set(dir(module))
    for name in (*module.__all__, "__version__"):
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(module, "no_such_name")  # noqa: B009


def test_faces_import_nothing_heavy() -> None:
    code = f"import sys, {', '.join(PACKAGES)}; print(*{{'torch', 'transformers', 'numpy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
