"""Certificates of other servers: each name that is asked has to prove itself, whichever address it shares."""

import asyncio
import datetime as dt
import ipaddress
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpcore
import httpx
import pytest
from anyio._backends._asyncio import SocketStream
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from server.core.stopwatch import Stopwatch
from server.jobs import safe_http
from server.jobs.safe_http import SafeHttp, Unreachable
from tests.test_outbound import overdraw

PROVEN = "proven.example"


class Host:
    """An HTTPS server with a certificate for one name, and what it was asked, by connection."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, str]] = []
        self.port = 0
        self.context: ssl.SSLContext

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                await reader.readexactly(int(head.split("content-length: ")[1].split("\r\n")[0]))
                self.asked.append((writer.get_extra_info("peername")[1], head.split("host: ")[1].split(":")[0]))
                writer.write(b"HTTP/1.1 201 Created\r\ncontent-length: 0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


def certify(folder: Path) -> Path:
    """Write a key and a certificate of `PROVEN`, and return the file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, PROVEN)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(PROVEN)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / "certificate.pem"
    file.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + certificate.public_bytes(Encoding.PEM)
    )
    return file


@pytest.fixture
async def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Host]:
    file = certify(tmp_path)
    trusted = ssl.create_default_context(cafile=str(file))
    monkeypatch.setattr(httpx, "create_ssl_context", lambda **_: trusted)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(file)
    host = Host()
    host.context = context
    listening = await asyncio.start_server(host.serve, "127.0.0.1", 0, ssl=context)
    host.port = listening.sockets[0].getsockname()[1]
    yield host
    listening.close()


@pytest.fixture
async def asker(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SafeHttp]:
    asker = SafeHttp(to_private=True)

    async def addresses(_: str, **__: object) -> list[str]:
        return ["127.0.0.1"]

    monkeypatch.setattr(asker._resolver, "addresses", addresses)  # noqa: SLF001
    yield asker
    await asker.close()


async def test_connection_that_one_name_has_proven_is_not_used_for_another_name(host: Host, asker: SafeHttp) -> None:
    for _ in range(2):
        assert (await asker.post(f"https://{PROVEN}:{host.port}/", b"", {}, stopwatch=Stopwatch())).status == 201
    (first, _), (second, _) = host.asked
    assert first == second, "one name keeps its connection"
    for name in ("other.example", "127.0.0.1", f"sub.{PROVEN}"):
        with pytest.raises(Unreachable, match=r"(?i)certificate"):
            await asker.post(f"https://{name}:{host.port}/", b"", {}, stopwatch=Stopwatch())
    assert {name for _, name in host.asked} == {PROVEN}


async def test_endless_parts_of_tls_are_left(host: Host, asker: SafeHttp, monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 tickets took a worker 100 ms, in portions of 64 KiB, and would have gone on for five seconds."""
    received: list[int] = []
    receive = SocketStream.receive

    async def spied(stream: SocketStream, max_bytes: int = 65_536) -> bytes:
        data = await receive(stream, max_bytes)
        received.append(len(data))
        return data

    monkeypatch.setattr(SocketStream, "receive", spied)
    host.context.num_tickets = 10_000
    with pytest.raises(Unreachable, match="too many parts"):
        await asker.post(f"https://{PROVEN}:{host.port}/", b"", {}, stopwatch=Stopwatch())
    assert sum(received) <= safe_http.MOST_OF_POST + safe_http.MAX_TLS_BYTES + safe_http.TURN_BYTES
    assert max(received) <= safe_http.TURN_BYTES
    host.context.num_tickets = 2
    assert (await asker.post(f"https://{PROVEN}:{host.port}/", b"", {}, stopwatch=Stopwatch())).status == 201


async def test_handshake_that_waits_for_our_share_of_the_loop_is_in_time(
    host: Host, asker: SafeHttp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safe_http, "TOTAL_SECONDS", 0.5)
    overdraw(asker._posts)  # noqa: SLF001
    stopwatch = Stopwatch()
    assert (await asker.post(f"https://{PROVEN}:{host.port}/", b"", {}, stopwatch=stopwatch)).status == 201
    assert stopwatch.seconds < safe_http.TOTAL_SECONDS


async def test_whatever_names_a_host_its_address_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    asker = SafeHttp(to_private=True)
    connected: list[object] = []

    async def connect(_: object, address: str, *__: object) -> None:
        connected.append(ipaddress.ip_address(address))
        raise OSError

    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", connect)
    for name in ("[::1]", "[::ffff:127.0.0.1]", "127.0.0.1", "localhost", "LOCALHOST"):
        with pytest.raises(Unreachable):
            await asker.get(f"http://{name}:9/", most=1)
    addresses = [ipaddress.ip_address(one) for one in ("::1", "::ffff:127.0.0.1", "127.0.0.1")]
    assert connected[:3] == addresses
    assert {*connected[3:]} <= {*addresses}
    await asker.close()
