"""Copies of a part keep off each other's nodes, where there are enough of them."""

import pytest

pytest.importorskip("ray")
from ray._private.label_utils import validate_fallback_strategy, validate_label_selector

from gsl_dist.cluster import serve
from gsl_dist.cluster.serve import keep_apart

TAKES = {"num_cpus": 1.0, "num_gpus": 0.0}
NODE = "ray.io/node-id"


@pytest.fixture
def nodes(monkeypatch):
    """The nodes that Ray knows of; tests add theirs."""
    known = []
    monkeypatch.setattr(serve.ray, "nodes", lambda: known)
    return known


def make_node(name, *, cpus=4.0, alive=True):
    return {"NodeID": name, "Alive": alive, "Resources": {"CPU": cpus, "memory": 1e9}}


@pytest.mark.parametrize("count, copies", [(2, 2), (3, 2), (7, 3)])
def test_no_node_is_open_to_two_copies_and_each_is_open_to_one(nodes, count, copies):
    nodes += [make_node(f"n{number}") for number in range(count)]
    places = keep_apart(copies, TAKES)
    assert len(places) == copies
    avoided = [set(place["label_selector"][NODE].removeprefix("!in(").removesuffix(")").split(",")) for place in places]
    names = {node["NodeID"] for node in nodes}
    assert all(sum(name not in others for others in avoided) == 1 for name in names)
    assert all(names - others for others in avoided)
    for place in places:
        assert validate_label_selector(place["label_selector"]) is None
        assert validate_fallback_strategy(place["fallback_strategy"]) is None


def test_where_there_are_too_few_nodes_with_room_a_copy_may_lie_anywhere(nodes):
    nodes += [make_node("n0"), make_node("small", cpus=0.5), make_node("gone", alive=False)]
    assert keep_apart(2, TAKES) == [{}, {}]
    nodes.append(make_node("n1"))
    assert keep_apart(2, TAKES) != [{}, {}] and keep_apart(3, TAKES) == [{}] * 3
    assert keep_apart(2, TAKES | {"memory": 2e9}) == [{}, {}]


def test_a_single_copy_asks_for_nothing():
    assert keep_apart(1, TAKES) == [{}]
