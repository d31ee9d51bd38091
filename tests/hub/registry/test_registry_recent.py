"""Catalogues in memory say what the store says, whoever changes it."""

from __future__ import annotations

import random
import threading

from hub.errors import HubError
from hub.ref import AdapterRef
from hub.registry.state.recent import Catalogues, Recent
from hub.store import Store

NAMES = ("acme/a", "acme/b")


def test_they_follow_another_writer(store, packed) -> None:
    """Law: after any sequence of changes by another process, each catalogue equals that of the store."""
    other = Store(store.root)
    found = Catalogues(Store(store.root), 16)
    chance = random.Random(0)
    for step in range(60):
        name = chance.choice(NAMES)
        versions = [release.version for release in other.catalogue(name).releases]
        verb = chance.choice(("put", "put", "yank", "unyank", "tag", "untag", "delete", "evict"))
        try:
            if verb == "put" or not versions:
                other.put(packed(f"{name}@1.{step}", seed=step)[0])
            elif verb == "tag":
                other.tag(f"{name}@{chance.choice(versions)}", chance.choice(("prod", "best")))
            elif verb == "untag":
                other.untag(name, "prod")
            elif verb in ("delete", "evict"):
                other.bury(f"{name}@{chance.choice(versions)}", "old", final=verb == "delete")
            else:
                ref = AdapterRef.parse(name).at(version=chance.choice(versions))
                other.yank(ref, "bad" if verb == "yank" else None)
        except HubError:  # there is no such alias, or one stands on it
            continue
        if chance.random() < 0.7:  # sometimes several changes come between two looks
            for each in NAMES:
                assert found.get(each) == other.catalogue(each)


def test_they_follow_while_others_write(store, packed) -> None:
    directories = [packed(f"acme/a@1.{index}", seed=index)[0] for index in range(12)]
    found = Catalogues(Store(store.root), 16)
    seen: list[list[int]] = [[], [], []]
    done = threading.Event()

    def look(counts: list[int]) -> None:
        while not done.is_set():
            counts.append(len(found.get("acme/a").releases))

    threads = [threading.Thread(target=look, args=(counts,)) for counts in seen]
    for thread in threads:
        thread.start()
    writer = Store(store.root)
    for directory in directories:
        writer.put(directory)
        assert directory is directories[len(found.get("acme/a").releases) - 1]  # what was put is seen at once
    done.set()
    for thread in threads:
        thread.join()
    for counts in seen:
        assert counts == sorted(counts)  # nothing that was seen is ever gone again
    assert found.get("acme/a") == writer.catalogue("acme/a")


def test_a_log_that_was_replaced(store, packed) -> None:
    store.put(packed("acme/a@1.0")[0])
    store.put(packed("acme/a@2.0", seed=1)[0])
    found = Catalogues(store, 16)
    assert len(found.get("acme/a").releases) == 2
    lines = store.ledger.path.read_bytes().splitlines(keepends=True)
    store.ledger.path.write_bytes(lines[0])  # restored from a backup of the day before
    assert [release.version for release in found.get("acme/a").releases] == ["1.0"]


def test_what_is_kept_is_bounded() -> None:
    kept: Recent[int, int] = Recent(10)
    for index in range(100):
        assert kept.put(index, index) == index
    assert [index for index in range(100) if kept.get(index) is not None] == list(range(90, 100))
