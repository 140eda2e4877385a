"""Network: how ranks would find each other, and what stands between this machine and downloads."""

import ipaddress
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardlaunch.launcher.commands.doctor.findings import Finding, note, ok, problem
from shardlaunch.sharding.environment import LaunchEnvironment
from shardlaunch.sharding.interfaces import BRIDGES

_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_INTERFACES = {"GLOO_SOCKET_IFNAME": "gloo", "NCCL_SOCKET_IFNAME": "NCCL"}
HUB = "https://huggingface.co"
HUB_TIMEOUT_S = 5


@dataclass(frozen=True, kw_only=True)
class Interface:
    """A network interface."""

    name: str
    addresses: Sequence[str] = ()
    is_up: bool = True


def check_meeting_point(
    env: Mapping[str, str], interfaces: Sequence[Interface], resolved: Sequence[str] | None, *, num_machines: int
) -> list[Finding]:
    """Return which interface gloo takes: that of GLOO_SOCKET_IFNAME, else that of the host name's address.

    `resolved` are the addresses of the host name, None if it has none. On loopback, ranks of other machines cannot
    reach this one: gloo passes its address on to them. `num_machines` is 1, or above if the launch spans several.
    """
    if env.get("GLOO_SOCKET_IFNAME"):
        return []  # said by `check_named_interfaces`
    level = problem if num_machines > 1 else note
    names = [one.name for one in interfaces if one.is_up and any(not _is_loopback(a) for a in one.addresses)]
    real = [name for name in names if not name.startswith(BRIDGES)]
    advice = "for several machines, set GLOO_SOCKET_IFNAME"
    advice += (
        f"={real[0]}" if len(real) == 1 else f" to one of {', '.join(real)}" if real else " to the right interface"
    )
    if resolved is None:
        return [
            level(
                f"the host name {socket.gethostname()} has no address: gloo uses loopback, on one machine only", advice
            )
        ]
    local = {address.partition("%")[0]: one for one in interfaces for address in one.addresses}
    chosen = next((address for address in resolved if address in local or _is_loopback(address)), None)
    if chosen is None:
        return [
            level(
                f"the host name has the address {resolved[0]}, which is none of this machine: gloo uses loopback, on "
                f"one machine only",
                advice,
            )
        ]
    if _is_loopback(chosen):
        return [level(f"the host name has the address {chosen}: gloo uses loopback, on one machine only", advice)]
    if local[chosen].name.startswith(BRIDGES):
        return [level(f"gloo uses {local[chosen].name} ({chosen}), a bridge that other machines cannot reach", advice)]
    return [ok(f"gloo uses {local[chosen].name} ({chosen}), the address of the host name")]


def check_named_interfaces(
    env: Mapping[str, str], interfaces: Sequence[Interface], *, num_machines: int
) -> list[Finding]:
    """Return whether the interfaces that variables name are there, and up. Those of NCCL may be beginnings of names."""
    findings = []
    known = {one.name: one for one in interfaces}
    for variable, library in _INTERFACES.items():
        text = env.get(variable, "")
        if not text or (library == "NCCL" and text.startswith("^")):  # all but those
            continue
        if text.startswith(("^", "=")) and library == "gloo":
            findings.append(
                problem(
                    f"{variable}={text}: gloo takes names alone; ^ and = are NCCL's", f"name one of {', '.join(known)}"
                )
            )
            continue
        for name in text.removeprefix("=").split(","):
            is_exact = library == "gloo" or text.startswith("=")
            found = [one for key, one in known.items() if key == name or (not is_exact and key.startswith(name))]
            if not found:
                there = ", ".join(known)
                findings.append(
                    problem(
                        f"{variable}={text}: this machine has no interface {name}",
                        f"choose one of {there}, or unset it",
                    )
                )
            elif not any(one.is_up and one.addresses for one in found):
                findings.append(
                    problem(f"{variable}={text}: {name} is down, or has no address", "choose another, or unset it")
                )
            elif all(_is_loopback(address) for one in found for address in one.addresses):
                level = problem if num_machines > 1 else note
                findings.append(
                    level(f"{variable}={text}: loopback, on one machine only", "unset it for several machines")
                )
            else:
                findings.append(ok(f"{library} uses {name} ({variable})"))
    return findings


def check_address(launch: LaunchEnvironment, *, num_machines: int) -> list[Finding]:
    """Return whether MASTER_ADDR is a machine's, and whether rank 0 can listen at MASTER_PORT."""
    if launch.world_size == 1 or not launch.master_addr:
        return []
    try:
        found = socket.getaddrinfo(launch.master_addr, None)
    except (OSError, UnicodeError):
        return [
            problem(
                f"{launch.address_source or 'MASTER_ADDR'}: no machine of the name {launch.master_addr} is known here",
                "set MASTER_ADDR to the name or address of the machine of rank 0, the same on all ranks",
            )
        ]
    if num_machines > 1 and all(_is_loopback(str(entry[4][0])) for entry in found):
        return [
            problem(
                f"MASTER_ADDR={launch.master_addr}: each of {num_machines} machines takes itself for that of rank 0, "
                f"and the ranks do not meet",
                "set MASTER_ADDR to an address of the machine of rank 0 that the others can reach",
            )
        ]
    if launch.rank == 0 and not launch.uses_agent_store and launch.master_port is not None:
        try:
            _bind(launch.master_addr, launch.master_port)
        except OSError as error:
            return [
                problem(
                    f"rank 0 cannot listen at {launch.master_addr}:{launch.master_port}: {error.strerror}",
                    "choose another MASTER_PORT, the same on all ranks; or MASTER_ADDR of this machine",
                )
            ]
    return []


def check_loopback() -> list[Finding]:
    """Return whether ranks of one machine can meet, as those of `shardlaunch run` do."""
    try:
        port = _bind("127.0.0.1", 0)
    except OSError as error:
        return [
            problem(
                f"no port can be opened at 127.0.0.1: {error.strerror}; ranks cannot meet",
                "bring the loopback interface up: ip link set lo up",
            )
        ]
    return [ok(f"ranks of this machine meet at 127.0.0.1, on a free port such as {port}")]


def check_proxies(env: Mapping[str, str]) -> list[Finding]:
    """Return which proxies downloads use."""
    names = [name for key in _PROXIES for name in (key, key.upper()) if env.get(name)]
    if not names:
        return []
    return [
        note(
            f"{', '.join(names)}: downloads and trackers go through a proxy; collectives and the ranks' meeting do not"
        )
    ]


def check_hub(env: Mapping[str, str], *, network: bool) -> list[Finding]:
    """Return whether models and data can be downloaded; only with `network` is the hub asked."""
    if env.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return [
            note(f"HF_HUB_OFFLINE={env['HF_HUB_OFFLINE']}: models and data come from the cache or from files alone")
        ]
    address = env.get("HF_ENDPOINT") or HUB
    if not network:
        return [ok(f"models and data that are not in the cache are downloaded from {address} (ask it with --network)")]
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_TIMEOUT_S):
            pass
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return [
            problem(
                f"{address} cannot be reached: {reason}",
                "set HF_HUB_OFFLINE=1 to use the cache without waiting for it, or HTTPS_PROXY",
            )
        ]
    return [ok(f"{address} answers")]


def interfaces_here() -> list[Interface]:
    """Return the interfaces of this machine."""
    import psutil

    stats = psutil.net_if_stats()
    return [
        Interface(
            name=name,
            addresses=tuple(one.address for one in addresses if one.family in (socket.AF_INET, socket.AF_INET6)),
            is_up=name not in stats or stats[name].isup,
        )
        for name, addresses in psutil.net_if_addrs().items()
    ]


def addresses_of_host() -> list[str] | None:
    """Return the addresses of this machine's name, None if it has none."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return None
    return [str(entry[4][0]).partition("%")[0] for entry in found]


def _bind(host: str, port: int) -> int:
    """Return the port, after listening there for a moment. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        bound: int = listening.getsockname()[1]
    return bound


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False
