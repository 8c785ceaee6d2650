"""IP addresses: parsing, and the keys of limits per address."""

import ipaddress
from functools import lru_cache

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
CLIENT_BITS = 64
"""Bits of an IPv6 address that identify a network. One customer has all addresses below it (RFC 6177)."""


def parsed(text: str) -> Address | None:
    """Return an IP address; one of IPv4 in IPv6 becomes IPv4. Return None if the text is anything else, such as an
    address with a zone.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv4Address):
        return address
    return None if address.scope_id is not None else address.ipv4_mapped or address


@lru_cache(maxsize=4096)
def limit_key(host: str) -> str:
    """Return the key of limits per address: the address itself, or the first 64 bits of an IPv6 address."""
    address = parsed(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Address(int(address) >> CLIENT_BITS << CLIENT_BITS)) + f"/{CLIENT_BITS}"
    return host if address is None else str(address)
