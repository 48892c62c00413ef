import os
import socket

import pytest

pytest.importorskip("ray")

from gsl_dist.cluster import network


def test_the_interface_of_an_address_is_found_and_of_a_strangers_none():
    name = network.find_interface("127.0.0.1")
    assert name in [name for _, name in socket.if_nameindex()]
    assert network.find_interface("198.51.100.7") is None  # for documents alone: nobody has it


@pytest.mark.parametrize(("given", "address", "wanted"), [(None, "127.0.0.1", "found"), ("eth7", "127.0.0.1", "eth7")])
def test_gloo_listens_where_ray_does_unless_it_was_told_otherwise(monkeypatch, given, address, wanted):
    # Set first, so that what the call sets is taken back after the test.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", given or "")
    if given is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(network.ray.util, "get_node_ip_address", lambda: address)
    network.listen_where_ray_does()
    assert os.environ["GLOO_SOCKET_IFNAME"] == (network.find_interface(address) if wanted == "found" else wanted)


def test_an_address_that_no_interface_has_leaves_gloo_alone(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(network.ray.util, "get_node_ip_address", lambda: "198.51.100.7")
    network.listen_where_ray_does()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
