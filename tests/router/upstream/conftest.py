"""The store of small adapters, as the home of the test: it may be changed."""

import shutil

import pytest

from hub.store import Store

BASE = "builtin:tiny-lm"


@pytest.fixture
def home(published, tmp_path, monkeypatch) -> Store:
    shutil.copytree(published.store.root, tmp_path / "home")
    monkeypatch.setenv("HUB_HOME", str(tmp_path / "home"))
    return Store()


@pytest.fixture
def names(home):
    from router.upstream.names import Names

    def make(base=BASE, rank=16, **options):
        made = Names(base, rank=rank, **options)
        made.identity()
        return made

    return make
