import pytest

from hub.errors import GateError
from hub.relations.lineage import ancestry, graph, order, reachable
from hub.store import Store


def composed(publish, name: str, *requires: str, **facts):
    needs = tuple({"name": need} for need in requires)
    return publish(f"acme/{name}@1.0", type="composition", expression=" + ".join(requires), requires=needs, **facts)


def test_order_puts_requirements_first(store: Store, publish) -> None:
    a, b = publish("acme/a@1.0"), publish("acme/b@1.0", seed=1)
    ab = composed(publish, "ab", "acme/a", "acme/b", seed=2)
    top = composed(publish, "top", "acme/ab", "acme/a", seed=3)
    unrelated = publish("acme/z@1.0", seed=4)
    found = order(graph(store), [top.digest])
    assert set(found) == {a.digest, b.digest, ab.digest, top.digest}
    assert found.index(a.digest) < found.index(ab.digest) < found.index(top.digest) == 3
    assert unrelated.digest not in found


def test_cycles_are_named(store: Store, publish) -> None:
    composed(publish, "a", "acme/b")
    b = composed(publish, "b", "acme/a", seed=1)
    with pytest.raises(GateError, match=r"acme/\w@1.0 -> acme/\w@1.0 -> acme/\w@1.0"):
        order(graph(store), [b.digest])


def test_missing_nodes_carry_their_ref(store: Store, publish) -> None:
    top = composed(publish, "top", "acme/gone")
    found = graph(store)
    assert found.nodes["acme/gone"] == {"ref": "acme/gone", "missing": True}
    assert order(found, [top.digest]) == ["acme/gone", top.digest]


def test_ancestry_and_reachability(store: Store, publish) -> None:
    a = publish("acme/a@1.0")
    b = publish("acme/a@1.1", seed=1, lineage={"parents": [f"acme/a@{a.digest}"]})
    c = publish("acme/a@1.2", seed=2, lineage={"parents": ["acme/a@1.1"]})
    top = composed(publish, "top", "acme/a", seed=3)
    found = graph(store)
    assert ancestry(found, c.digest) == [b.digest, a.digest]
    assert reachable(found, [top.digest]) == {top.digest, c.digest, b.digest, a.digest}
    assert reachable(found, [b.digest]) == {b.digest, a.digest}
    assert order(found, [c.digest]) == [c.digest]  # parents are history, not requirements
