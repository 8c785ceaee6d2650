"""Certificates of other servers: each host name is verified, even if it shares its address with another one."""

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
    """An HTTPS server with a certificate for one name, and the requests that it received, by connection."""

    def __init__(self) -> None:
        self.requests: list[tuple[int, str]] = []
        self.port = 0
        self.context: ssl.SSLContext

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                await reader.readexactly(int(head.split("content-length: ")[1].split("\r\n")[0]))
                self.requests.append((writer.get_extra_info("peername")[1], head.split("host: ")[1].split(":")[0]))
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
async def safe_client(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SafeHttp]:
    safe_client = SafeHttp(to_private=True)

    async def addresses(_: str, **__: object) -> list[str]:
        return ["127.0.0.1"]

    monkeypatch.setattr(safe_client._resolver, "addresses", addresses)  # noqa: SLF001
    yield safe_client
    await safe_client.close()


async def test_connection_verified_for_one_name_is_not_used_for_another(host: Host, safe_client: SafeHttp) -> None:
    for _ in range(2):
        assert (await safe_client.post(f"https://{PROVEN}:{host.port}/", b"", {}, stopwatch=Stopwatch())).status == 201
    (first, _), (second, _) = host.requests
    assert first == second, "the connection is reused for the same name"
    for name in ("other.example", "127.0.0.1", f"sub.{PROVEN}"):
        with pytest.raises(Unreachable, match=r"(?i)certificate"):
            await safe_client.post(f"https://{name}:{host.port}/", b"", {}, stopwatch=Stopwatch())
    assert {name for _, name in host.requests} == {PROVEN}


async def test_endless_tls_records_are_refused(
    host: Host, safe_client: SafeHttp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10,000 session tickets would keep a worker busy for 100 ms, in parts of 64 KiB, and last five seconds."""
    received: list[int] = []
    receive = SocketStream.receive

    async def spied(stream: SocketStream, max_bytes: int = 65_536) -> bytes:
        data = await receive(stream, max_bytes)
        received.append(len(data))
        return data

    monkeypatch.setattr(SocketStream, "receive", spied)
    host.context.num_tickets = 10_000
    with pytest.raises(Unreachable, match="too many parts"):
        await safe_client.post(f"https://{PROVEN}:{host.port}/", b"", {}, stopwatch=Stopwatch())
    assert sum(received) <= safe_http.MOST_OF_POST + safe_http.MAX_TLS_BYTES + safe_http.TURN_BYTES
    assert max(received) <= safe_http.TURN_BYTES
    host.context.num_tickets = 2
    assert (await safe_client.post(f"https://{PROVEN}:{host.port}/", b"", {}, stopwatch=Stopwatch())).status == 201


async def test_wait_for_a_share_of_the_loop_does_not_count_toward_the_handshake_timeout(
    host: Host, safe_client: SafeHttp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safe_http, "TOTAL_SECONDS", 0.5)
    overdraw(safe_client._posts)  # noqa: SLF001
    stopwatch = Stopwatch()
    assert (await safe_client.post(f"https://{PROVEN}:{host.port}/", b"", {}, stopwatch=stopwatch)).status == 201
    assert stopwatch.seconds < safe_http.TOTAL_SECONDS


async def test_connections_go_to_the_resolved_address(monkeypatch: pytest.MonkeyPatch) -> None:
    safe_client = SafeHttp(to_private=True)
    connected: list[object] = []

    async def connect(_: object, address: str, *__: object) -> None:
        connected.append(ipaddress.ip_address(address))
        raise OSError

    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", connect)
    for name in ("[::1]", "[::ffff:127.0.0.1]", "127.0.0.1", "localhost", "LOCALHOST"):
        with pytest.raises(Unreachable):
            await safe_client.get(f"http://{name}:9/", most=1)
    addresses = [ipaddress.ip_address(one) for one in ("::1", "::ffff:127.0.0.1", "127.0.0.1")]
    assert connected[:3] == addresses
    assert {*connected[3:]} <= {*addresses}
    await safe_client.close()
