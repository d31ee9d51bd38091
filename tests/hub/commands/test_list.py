import pytest
from click.testing import CliRunner

from hub.cli import main
from hub.errors import UsageError
from hub.store import Store


@pytest.fixture
def full(store: Store, publish, base_identity) -> Store:
    accuracy = {"dataset": "sst2", "metric": "accuracy"}
    publish("acme/tone@1.0", seed=0, task="chat", labels=("calm",), metrics=({**accuracy, "value": 0.7},))
    publish("acme/tone@1.10", seed=1, task="chat", domains=("law",), metrics=({**accuracy, "value": 0.9},))
    publish("acme/tone@1.9", seed=2, task="chat", metrics=({"dataset": "x", "metric": "perplexity", "value": 3.0},))
    publish("acme/mood@1.0", seed=3, kind="ia3", base=base_identity, license="MIT", summary="Detects moods of speakers")
    publish("beta/tone@2.0", seed=4, languages=("de",), method="sora", metrics=({**accuracy, "value": 0.8},))
    publish("merged@1.0", seed=5, type="merge", metrics=({"dataset": "x", "metric": "perplexity", "value": 2.0},))
    store.tag("acme/tone@1.0", "prod")
    return store


def refs(found) -> list[str]:
    return [str(artifact.ref) for artifact in found]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"name": "acme/tone"}, ["acme/tone@1.0", "acme/tone@1.9", "acme/tone@1.10"]),
        ({"name": "tone", "newest": True}, ["acme/tone@1.10", "beta/tone@2.0"]),
        ({"name": "acme/*", "newest": True}, ["acme/mood@1.0", "acme/tone@1.10"]),
        ({"namespace": "beta"}, ["beta/tone@2.0"]),
        ({"namespace": "local"}, ["local/merged@1.0"]),
        ({"kind": "ia3"}, ["acme/mood@1.0"]),
        ({"type": "merge"}, ["local/merged@1.0"]),
        ({"method": "sora"}, ["beta/tone@2.0"]),
        ({"task": "chat", "label": "calm"}, ["acme/tone@1.0"]),
        ({"domain": "law"}, ["acme/tone@1.10"]),
        ({"language": "de"}, ["beta/tone@2.0"]),
        ({"base": "builtin:tiny-lm"}, ["acme/mood@1.0"]),
        ({"base": "sha256:" + "a" * 64}, ["acme/mood@1.0"]),
        ({"base": "other"}, []),
        ({"license": "MIT"}, ["acme/mood@1.0"]),
        ({"alias": "prod"}, ["acme/tone@1.0"]),
        ({"text": "mood speak"}, ["acme/mood@1.0"]),
        ({"text": "law"}, ["acme/tone@1.10"]),
        ({"text": 'tone" OR 1'}, []),
        ({"sort": "accuracy"}, ["acme/tone@1.10", "beta/tone@2.0", "acme/tone@1.0"]),
        ({"sort": "accuracy", "ascending": True, "limit": 1}, ["acme/tone@1.0"]),
        ({"sort": "perplexity"}, ["local/merged@1.0", "acme/tone@1.9"]),  # least first
        ({"sort": "accuracy", "name": "beta/tone"}, ["beta/tone@2.0"]),
        ({"kind": None, "limit": 1}, ["acme/mood@1.0"]),
    ],
)
def test_filters(full: Store, filters, expected: list[str]) -> None:
    assert refs(full.list(**filters)) == expected


@pytest.mark.parametrize("metric", ["f1", "loss"])
@pytest.mark.parametrize("newest", [False, True])
def test_the_best_few_are_the_first_of_all(store: Store, publish, metric: str, newest: bool) -> None:
    """The short way to the best goes by the figures, of which an artifact may have several; it finds the same."""
    figures = [(5, 1), (4,), (9, 9), (2, 8, 3), (), (7,), (6, 0)]
    for i, values in enumerate(figures):
        found = tuple(
            {"dataset": f"d{j}", "metric": name, "value": value}
            for j, value in enumerate(values)
            for name in ("f1", "loss", "other")
        )
        publish(f"acme/a{i % 4}@1.{i}", seed=i, metrics=found)
    store.yank("acme/a1@1.5", "bad")
    everything = refs(store.list(sort=metric, newest=newest))
    assert len(everything) == (3 if newest else 5)  # but for the yanked one, and the one without a figure
    for limit in range(1, 8):
        assert refs(store.list(sort=metric, newest=newest, limit=limit)) == everything[:limit]
    assert "acme/a1@1.5" in refs(store.list(sort=metric, yanked=True, limit=6))


def test_newest_created_first(full: Store) -> None:
    assert refs(full.list(sort="created"))[0] == "local/merged@1.0"


def test_unknown_filter(full: Store) -> None:
    with pytest.raises(UsageError) as caught:
        full.list(knd="lora")
    assert caught.value.hint == "did you mean kind?"
    with pytest.raises(UsageError):
        full.list(text="!!!")


def test_injection_stays_text(full: Store) -> None:
    assert full.list(kind="x' OR '1'='1") == []
    assert full.list(sort="accuracy) --") == []
    assert len(full.list()) == 6


def test_the_table_fits_80_columns_and_names_stay_whole(store: Store, publish, base_identity, monkeypatch) -> None:
    base = base_identity.model_copy(update={"repo": "meta-llama/Llama-3.2-Vision-11B-Instruct"})
    publish("acme/a-long-name-of-an-adapter@1.0", base=base)
    store.tag("acme/a-long-name-of-an-adapter@1.0", "production-of-the-week")
    monkeypatch.setenv("HUB_HOME", str(store.root))
    result = CliRunner().invoke(main, ["list"], catch_exceptions=False)
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].startswith("acme/a-long-name-of-an-adapter  1.0 ")
    assert "nstruct" in lines[1]  # the end of a model's name tells more than its beginning
    assert "TASK" not in lines[0]  # nobody has one
