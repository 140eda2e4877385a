"""The network interface over which ranks of several machines exchange messages on the CPU."""

import ipaddress
import os
import socket
import time

import psutil
import torch.distributed as dist

from shardlaunch.errors import UserError
from shardlaunch.sharding.environment import LaunchEnvironment

VARIABLE = "GLOO_SOCKET_IFNAME"
LEAVING_S = 5.0
BRIDGES = ("docker", "br-", "veth", "virbr", "cni", "podman")
_FROM_OUTSIDE, _CHOSEN, _NOT_FOUND = (f"shardlaunch/interfaces/{name}" for name in ("outside", "chosen", "not-found"))


def choose_interfaces(env: LaunchEnvironment, store: dist.Store, *, is_first: bool) -> str:
    """Let gloo use the interface by which a machine reaches rank 0, where it would use loopback. All ranks.

    gloo takes the address of the machine's name, which in Debian is 127.0.1.1. `is_first` is True on one rank of each
    machine, of which there are several. Returns what is to be said. Raises UserError on all ranks if a machine has no
    interface that is meant, or several that may be.
    """
    towards = _own_address(env.master_addr)
    if is_first and towards and not _is_loopback(towards):
        store.set(_FROM_OUTSIDE, "")
    _await_all(store, env, "looked")
    if not store.check([_FROM_OUTSIDE]):  # several launchers on one machine
        return ""
    if not os.environ.get(VARIABLE) and not _is_reached_by_name():
        chosen = _interface_of(towards)
        if chosen:
            os.environ[VARIABLE] = chosen
        if is_first:
            text = f"{chosen} on {socket.gethostname()}" if chosen else socket.gethostname()
            store.set(_CHOSEN if chosen else _NOT_FOUND, text)
    _await_all(store, env, "chosen")
    if store.check([_NOT_FOUND]):
        name = store.get(_NOT_FOUND).decode()
        _leave(store, env)
        raise UserError(
            f"the name of {name} has a loopback address there, or none, by which ranks of other machines cannot reach "
            f"it: set GLOO_SOCKET_IFNAME to the interface that they reach, or give the name its address in /etc/hosts"
        )
    if not store.check([_CHOSEN]):
        return ""
    return (
        f"gloo uses {store.get(_CHOSEN).decode()}, by which rank 0 is reached: the name of the machine has a loopback "
        f"address there, or none ({VARIABLE} sets another)"
    )


def _await_all(store: dist.Store, env: LaunchEnvironment, what: str) -> None:
    """Wait until all ranks have come here."""
    if store.add(f"shardlaunch/interfaces/num-{what}", 1) == env.world_size:
        store.set(f"shardlaunch/interfaces/all-{what}", "")
    store.wait([f"shardlaunch/interfaces/all-{what}"])


def _leave(store: dist.Store, env: LaunchEnvironment) -> None:
    """Let rank 0, which may have the store, be the last that leaves it."""
    num_left = store.add("shardlaunch/interfaces/num-left", 1)
    end = time.monotonic() + LEAVING_S
    while env.rank == 0 and num_left < env.world_size and time.monotonic() < end:
        time.sleep(0.05)
        num_left = store.add("shardlaunch/interfaces/num-left", 0)
    time.sleep(0.05)  # the last of them gets its answer


def _own_address(target: str) -> str:
    """Return the address of this machine from which it reaches another, empty if it does not."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(target, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # which sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _interface_of(address: str) -> str:
    """Return the interface that has an address of this machine, the only one if that is loopback; empty: not known."""
    here = {
        one.address: name
        for name, addresses in psutil.net_if_addrs().items()
        for one in addresses
        if one.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(one.address)
    }
    if address in here:
        return str(here[address])
    up = psutil.net_if_stats()
    others = {name for name in here.values() if not name.startswith(BRIDGES) and (name not in up or up[name].isup)}
    return str(others.pop()) if len(others) == 1 else ""


def _is_reached_by_name() -> bool:
    """Return whether gloo's choice, the first address of the name that is this machine's, is one for others too."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
        except OSError:
            continue
        return not _is_loopback(str(address[0]))
    return False


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
