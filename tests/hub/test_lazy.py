"""The faces of the four packages: every name is there, and naming a package costs nothing."""

import importlib
import subprocess
import sys

import pytest

PACKAGES = ("hub", "compose", "router", "train")


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
