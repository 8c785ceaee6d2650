"""Trusted proxies, and the client's address in X-Forwarded-For (docs/decisions/0029)."""

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from protocol.errors import ErrorCode, Refused
from server.core.addresses import Address, parsed

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
MAX_COUNT = 10
FORWARDED_FOR = b"x-forwarded-for"


class Client(NamedTuple):
    """The sender of a request, as reported by trusted proxies."""

    host: str | None
    """The client's address. None if no proxy reported one."""
    hops: int
    """Trusted proxies that the request passed through. 0 means that its headers are not trusted."""


@dataclass(frozen=True, slots=True)
class Proxies:
    """The setting: either the number of proxies that every request passes through, or their networks."""

    count: int = 0
    networks: tuple[Network, ...] = ()

    @classmethod
    def read(cls, text: str) -> "Proxies":
        """Parse the setting. Raises ValueError, with a sentence, if it is invalid."""
        if not text.strip():
            return cls()
        if text.strip().isdecimal():
            if int(text) > MAX_COUNT:
                raise ValueError(f"the number of proxies must be at most {MAX_COUNT}")
            return cls(count=int(text))
        return cls(networks=networks(text))

    def __bool__(self) -> bool:
        return bool(self.count or self.networks)

    def trusts(self, peer: str | None) -> bool:
        """Whether a TCP peer is a trusted proxy."""
        if self.count:
            return True
        address = None if peer is None else parsed(peer)
        return address is not None and is_within(address, self.networks)

    def client(self, peer: str | None, forwarded_for: Sequence[str]) -> Client:
        """Return the client of a request. `forwarded_for` has the entries of X-Forwarded-For, to which each proxy
        appends one. Raises Refused if the client's entry is not an IP address.
        """
        if not self.trusts(peer):
            return Client(None, 0)
        entries = list(forwarded_for)
        if self.count:
            # With fewer entries than proxies, the request bypassed one of them, and the client may have written all
            # entries.
            if len(entries) < self.count:
                return Client(None, 0)
            return Client(str(_required(entries[-self.count])), self.count)
        hops, address = 1, None
        for entry in reversed(entries):
            address = _required(entry)
            if not is_within(address, self.networks):
                break
            hops += 1
        return Client(None if address is None else str(address), hops)


def entries(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[str]:
    """Return the entries of a header. Several lines of it form one list."""
    lines = [value.decode("latin-1") for key, value in headers if key.lower() == name]
    return [entry.strip() for entry in ",".join(lines).split(",")] if any(map(str.strip, lines)) else []


class HostBits(ValueError):  # noqa: N818 - its text is the advice for the operator
    """An address instead of a network, such as 10.0.0.1/8. The text says what to set."""


def networks(text: str) -> tuple[Network, ...]:
    """Parse networks separated by commas. Raises ValueError if one is not a network, and HostBits if it is an address
    in one.
    """
    return tuple(_network(one.strip()) for one in text.split(","))


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        loose = ipaddress.ip_network(text, strict=False)
    address = text.partition("/")[0]
    alone = ipaddress.ip_network(address)
    raise HostBits(f"{text} is an address in {loose}. Give {loose}, or {alone} for that address alone.")


def is_within(address: Address, some: Sequence[Network]) -> bool:
    """Whether an address is in at least one of the networks."""
    return any(address in network for network in some)


def _required(entry: str) -> Address:
    address = parsed(entry)
    if address is None:
        raise Refused(
            ErrorCode.INVALID,
            "The client's entry in `X-Forwarded-For` must be an IP address without port or zone.",
            path="x-forwarded-for",
        )
    return address
