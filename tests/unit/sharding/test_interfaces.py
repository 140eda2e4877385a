"""Which interface gloo uses where the name of a machine has a loopback address (on hosts: tests/faults/hosts.py)."""

import os
import socket
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore

from shardlaunch.errors import UserError
from shardlaunch.sharding import interfaces
from shardlaunch.sharding.environment import LaunchEnvironment
from shardlaunch.sharding.interfaces import VARIABLE, choose_interfaces

ALONE = LaunchEnvironment(world_size=1, master_addr="node1")  # who need not wait for others


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what this machine seems to be: addresses by interface, its own on the way to rank 0, that of its name."""
    machine = SimpleNamespace(addresses={"lo": "127.0.0.1", "eth0": "10.0.0.2"}, towards="10.0.0.2", name="127.0.1.1")

    def addresses() -> dict[str, list[Any]]:
        found = machine.addresses.items()
        return {name: [SimpleNamespace(address=one, family=socket.AF_INET)] for name, one in found}

    def resolved(*_: Any, **__: Any) -> list[Any]:
        if not machine.name:
            raise socket.gaierror
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (machine.name, 0))]

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(interfaces.psutil, "net_if_addrs", addresses)
    monkeypatch.setattr(interfaces.psutil, "net_if_stats", dict)
    monkeypatch.setattr(interfaces, "_own_address", lambda _: machine.towards)
    monkeypatch.setattr(interfaces.socket, "getaddrinfo", resolved)
    return machine


def chosen() -> str:
    """Return the interface that is chosen, which is said."""
    said = choose_interfaces(ALONE, HashStore(), is_first=True)
    name = os.environ.get(VARIABLE, "")
    assert said.startswith(f"gloo uses {name} on {socket.gethostname()}, by which rank 0 is reached") or not name
    return name


def test_a_name_of_loopback(machine: Any) -> None:
    assert chosen() == "eth0"


def test_a_name_without_an_address(machine: Any) -> None:
    machine.name = ""
    machine.addresses["ib0"] = "10.1.0.2"
    assert chosen() == "eth0"


def test_the_machine_of_rank_0_that_knows_itself_by_loopback(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    store.set("shardlaunch/interfaces/outside", "")  # another machine reaches it from outside
    machine.towards = "127.0.1.1"
    machine.addresses["docker0"] = "172.17.0.1"
    assert "gloo uses eth0" in choose_interfaces(ALONE, store, is_first=True)
    monkeypatch.delenv(VARIABLE)
    machine.addresses["ib0"] = "10.1.0.2"
    with pytest.raises(UserError, match=f"set {VARIABLE} to the interface"):
        choose_interfaces(ALONE, store, is_first=True)


def test_nothing_is_chosen(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the name's address is one for others, where all ranks are on one machine, and where a person has chosen."""
    machine.name = machine.addresses["eth0"] = "127.0.0.2"  # binds here; not taken for loopback
    monkeypatch.setattr(interfaces, "_is_loopback", lambda address: address in ("127.0.0.1", "127.0.1.1"))
    assert chosen() == ""
    machine.name = machine.towards = "127.0.1.1"
    assert chosen() == ""
    machine.towards = "10.0.0.2"
    monkeypatch.setenv(VARIABLE, "ib0")
    assert choose_interfaces(ALONE, HashStore(), is_first=True) == ""
    assert os.environ[VARIABLE] == "ib0"
