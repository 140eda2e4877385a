"""Interfaces, names, addresses and proxies: made-up machines."""

import socket
from typing import Any

import pytest

from shardlaunch.launcher.commands.doctor import network
from shardlaunch.launcher.commands.doctor.network import Interface
from shardlaunch.sharding.environment import LaunchEnvironment
from tests.unit.launcher.commands.doctor.levels import fine, only, said

LO = Interface(name="lo", addresses=("127.0.0.1", "::1"))
ETH = Interface(name="eth0", addresses=("10.0.0.5", "fe80::1%eth0"))
DOCKER = Interface(name="docker0", addresses=("172.17.0.1",))
DOWN = Interface(name="ib0", addresses=("10.1.0.5",), is_up=False)
ALL = (LO, ETH, DOCKER, DOWN)


@pytest.mark.parametrize(
    ("resolved", "part"),
    [
        (None, "has no address"),
        (["127.0.1.1"], "has the address 127.0.1.1: gloo uses loopback"),
        (["10.9.9.9"], "which is none of this machine"),
        (["172.17.0.1"], "docker0 (172.17.0.1), a bridge"),
    ],
)
def test_addresses_that_other_machines_cannot_reach(resolved: list[str] | None, part: str) -> None:
    for num_machines, level in ((1, "note"), (2, "problem")):
        findings = network.check_meeting_point({}, ALL, resolved, num_machines=num_machines)
        only(findings, level, part)
        assert "GLOO_SOCKET_IFNAME=eth0" in said(findings, level)


def test_the_interface_of_gloo() -> None:
    (found,) = network.check_meeting_point({}, ALL, ["10.9.9.9", "10.0.0.5"], num_machines=2)
    assert found.text.startswith("gloo uses eth0 (10.0.0.5)")
    fine([found])
    (found,) = network.check_meeting_point(
        {}, (LO, ETH, Interface(name="eth1", addresses=("10.2.0.5",))), None, num_machines=2
    )
    assert found.advice.endswith("to one of eth0, eth1")
    (found,) = network.check_meeting_point({}, (LO, DOCKER), None, num_machines=2)
    assert found.advice.endswith("to the right interface")
    assert network.check_meeting_point({"GLOO_SOCKET_IFNAME": "eth0"}, ALL, None, num_machines=2) == []


@pytest.mark.parametrize(
    ("env", "num_machines", "level", "part"),
    [
        ({"GLOO_SOCKET_IFNAME": "eth9"}, 1, "problem", "no interface eth9 -> choose one of lo, eth0"),
        ({"GLOO_SOCKET_IFNAME": "eth"}, 1, "problem", "no interface eth"),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, 1, "problem", "no interface eth"),
        ({"GLOO_SOCKET_IFNAME": "^lo,docker"}, 1, "problem", "gloo takes names alone"),
        ({"GLOO_SOCKET_IFNAME": "ib0"}, 1, "problem", "ib0 is down"),
        ({"GLOO_SOCKET_IFNAME": "lo"}, 2, "problem", "loopback, on one machine only"),
        ({"NCCL_SOCKET_IFNAME": "lo"}, 1, "note", "loopback, on one machine only"),
    ],
)
def test_interfaces_that_variables_name(env: dict[str, str], num_machines: int, level: str, part: str) -> None:
    only(network.check_named_interfaces(env, ALL, num_machines=num_machines), level, part)


def test_interfaces_that_are_right() -> None:
    env = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth"}
    fine(network.check_named_interfaces(env, ALL, num_machines=2))
    assert network.check_named_interfaces({"NCCL_SOCKET_IFNAME": "^docker"}, ALL, num_machines=2) == []


def test_the_address_where_ranks_meet() -> None:
    def at(host: str, port: int, *, num_machines: int = 1, **more: Any) -> list[network.Finding]:
        env = LaunchEnvironment(world_size=2, master_addr=host, master_port=port, **more)
        return network.check_address(env, num_machines=num_machines)

    only(at("localhost", 29500, num_machines=2, rank=1), "problem", "the ranks do not meet")
    fine(at("10.0.0.5", 29500, num_machines=2, rank=1))
    assert network.check_address(LaunchEnvironment(master_addr="gone.invalid"), num_machines=1) == []

    only(at("no-such-host.invalid", 29500), "problem", "no machine of the name no-such-host.invalid")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        only(at("127.0.0.1", port), "problem", f"rank 0 cannot listen at 127.0.0.1:{port}")
        fine(at("127.0.0.1", port, rank=1))
        fine(at("127.0.0.1", port, uses_agent_store=True))
    fine(at("127.0.0.1", port))


def test_no_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    fine(network.check_loopback())

    def refused(host: str, port: int) -> int:
        raise OSError(99, "Cannot assign requested address")

    monkeypatch.setattr(network, "_bind", refused)
    only(network.check_loopback(), "problem", "ip link set lo up")


def test_proxies_and_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    only(network.check_proxies({"HTTPS_PROXY": "http://p:1", "no_proxy": "x"}), "note", "HTTPS_PROXY: downloads")
    fine(network.check_proxies({"no_proxy": "x"}))
    only(network.check_hub({"HF_HUB_OFFLINE": "1"}, network=True), "note", "from the cache")
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        env = {"HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}"}
        fine(network.check_hub(env, network=False))  # nothing is asked
        only(network.check_hub(env, network=True), "problem", "cannot be reached")


def test_this_machine() -> None:
    assert "127.0.0.1" in {address for one in network.interfaces_here() for address in one.addresses}
    addresses = network.addresses_of_host()
    assert addresses is None or all(addresses)
