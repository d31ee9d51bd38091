"""The registry of plugins: by name, without imports where none is needed, and a broken one breaks only itself."""

import sys

import pytest

from hub.errors import UsageError
from hub.plugins import Registry

WIDGET = """
    from {registry} import WIDGETS

    @WIDGETS.register("{name}")
    class Widget: ...
"""


@pytest.fixture
def widgets(plugin_package, tmp_path, monkeypatch):
    """A registry whose folder has the plugins ``round`` and ``square``; its contract lies in a module of its own."""

    def make(group: str, entry: str = "") -> Registry:
        contract = f"contract_{group.rpartition('.')[2]}"
        texts = {name: WIDGET.format(registry=contract, name=name) for name in ("round", "square")}
        folder = plugin_package(group, entry=entry, **texts)
        (tmp_path / "contracts").mkdir(exist_ok=True)
        (tmp_path / "contracts" / f"{contract}.py").write_text(
            f"from hub.plugins import Registry\nWIDGETS = Registry('widget', package={folder!r}, group={group!r})\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path / "contracts"))
        return __import__(contract).WIDGETS

    return make


def test_names_import_nothing(widgets) -> None:
    registry = widgets("hub.lazy_widgets", "star = acme_star.widget")
    assert registry.names() == ["round", "square", "star"]
    assert f"{registry.package}.round" not in sys.modules
    assert list(registry) == ["round", "square"]
    assert f"{registry.package}.round" in sys.modules


def test_an_unknown_name_is_told_the_nearest(widgets) -> None:
    registry = widgets("hub.near_widgets")
    with pytest.raises(UsageError, match=r"unknown widget 'sqare'; did you mean square\?") as caught:
        registry.get("sqare")
    assert caught.value.hint == "widgets: round, square"


def test_a_broken_plugin_is_named_with_its_package_and_breaks_only_itself(widgets) -> None:
    registry = widgets("hub.torn_widgets", "star = acme_star.widget")
    assert registry.get("round").__name__ == "Widget"
    assert "star" not in registry
    with pytest.raises(
        UsageError, match=r"'star' of acme-star cannot be loaded from acme_star\.widget: ModuleNotFound"
    ):
        registry.get("star")
    (broken,) = registry.broken()
    assert (broken.name, broken.point.group) == ("star", "hub.torn_widgets")


def test_a_name_taken_twice_is_refused(widgets) -> None:
    registry = widgets("hub.twice_widgets")
    assert len(registry.all()) == 2
    with pytest.raises(UsageError, match=r"widget 'round' is registered twice: plugins_.*\.round and "):
        registry.register("round")(type("Other", (), {}))
    registry.register("round")(registry.get("round"))  # the very same one is no second one
