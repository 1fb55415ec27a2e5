from __future__ import annotations

from tests.proxy.conftest import free_port


def test_no_two_nodes_of_a_test_get_one_port():
    ports = [free_port() for _ in range(1000)]
    assert len(set(ports)) == 1000
