"""The shipped deploy/nginx.conf in a real nginx, behind another one that terminates TLS."""

import asyncio
import os
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from websockets.exceptions import InvalidStatus

from protocol import client
from prove.client import Client
from server.core.config import Settings
from tests.world import ON_LOOPBACK, World

CONF = Path(__file__).parent.parent / "deploy" / "nginx.conf"
ADA = {"name": "Ada", "email": "ada@example.org", "password": "correct horse"}
OUTER = """
events {{ worker_connections 256; }}
http {{
    access_log off;
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {folder}/certificate.pem;
        ssl_certificate_key {folder}/key.pem;
        location / {{
            proxy_pass http://127.0.0.1:{inner};
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $http_connection;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_set_header X-Forwarded-Proto $scheme;
        }}
    }}
}}
"""

pytestmark = pytest.mark.more


class Nginx:
    """An nginx with its own folder."""

    def __init__(self, folder: Path, conf: str) -> None:
        found = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
        assert found, "these tests need nginx"
        folder.mkdir(exist_ok=True)
        (folder / "nginx.conf").write_text(conf)
        own = f"pid {folder}/pid; daemon off; master_process off;"
        self._command = [found, "-p", str(folder), "-e", f"{folder}/error.log", "-g", own, "-c", f"{folder}/nginx.conf"]
        self._process: subprocess.Popen[bytes] | None = None

    def check(self) -> None:
        subprocess.run([*self._command, "-t", "-q"], check=True, timeout=20)

    async def start(self, port: int) -> None:
        self._process = subprocess.Popen(self._command)  # noqa: ASYNC220 - takes no time
        async with asyncio.timeout(20):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    assert self._process.poll() is None
                    await asyncio.sleep(0.05)
                else:
                    writer.close()
                    return

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(ON_LOOPBACK)
        return int(one.getsockname()[1])


def shipped(port: int, upstream: str) -> str:
    """Return deploy/nginx.conf with other addresses."""
    conf, servers = re.subn(r"server server-1:8000", f"server {upstream}", CONF.read_text())
    conf, others = re.subn(r"\n *server server-2:8000[^\n]*", "", conf)
    conf, listens = re.subn(r"listen 8000;", f"listen 127.0.0.1:{port}; access_log off;", conf)
    assert (servers, others, listens) == (1, 1, 1)
    return conf


def certify(folder: Path) -> ssl.SSLContext:
    """Write a certificate for 127.0.0.1, and return a context that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "OpenChat's tests")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(hours=1))
        .not_valid_after(datetime.now(UTC) + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(exist_ok=True)
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return ssl.create_default_context(cafile=str(folder / "certificate.pem"))


@pytest.fixture
def stopped() -> Iterator[list[Nginx]]:
    """Return a list. Each nginx that a test appends to it is stopped at the end."""
    running: list[Nginx] = []
    yield running
    for one in running:
        one.stop()


def test_nginx_accepts_the_shipped_configuration(tmp_path: Path) -> None:
    Nginx(tmp_path, shipped(1, "127.0.0.1:1")).check()


@pytest.mark.parametrize("setting", ["2", "127.0.0.1/32"])
async def test_clients_behind_two_proxies_are_limited_by_their_own_address(
    settings: Settings, tmp_path: Path, stopped: list[Nginx], setting: str
) -> None:
    changes = {"trusted_proxies": setting, "connections_per_address": 2, "login_attempts_per_address": 4}
    async with World(msgspec.structs.replace(settings, **changes), workers=1) as world:
        trust = certify(tmp_path / "outer")
        inner_port, outer_port = free_port(), free_port()
        inner = Nginx(tmp_path / "inner", shipped(inner_port, world.url.removeprefix("http://")))
        outer = Nginx(tmp_path / "outer", OUTER.format(port=outer_port, folder=tmp_path / "outer", inner=inner_port))
        for nginx, port in ((inner, inner_port), (outer, outer_port)):
            stopped.append(nginx)
            await nginx.start(port)
        url = f"https://127.0.0.1:{outer_port}"
        page = {"Origin": url}

        def at(address: str) -> httpx.AsyncClient:
            transport = httpx.AsyncHTTPTransport(verify=trust, local_address=address)
            return httpx.AsyncClient(base_url=url, transport=transport)

        async with at("127.0.0.2") as ada, at("127.0.0.3") as charles:
            # A browser whose script adds an entry of its own to the header.
            answer = await ada.post("/v1/auth/register", json=ADA, headers=page | {"X-Forwarded-For": "198.51.100.1"})
            assert answer.status_code == HTTPStatus.CREATED, answer.text
            assert "secure" in answer.headers["set-cookie"].lower()
            assert await world.db.fetchval("SELECT ip_address FROM session") == "127.0.0.2"
            cookie = {"Cookie": f"__Host-openchat_session={answer.json()['token']}"}

            # Sockets with the cookie and the page's `Origin`. The limit per address holds for all forged entries.
            def come(address: str, **headers: str) -> Client:
                options: dict[str, Any] = {
                    "origin": url,
                    "headers": cookie | headers,
                    "ssl": trust,
                    "local_addr": (address, 0),
                }
                return Client(url, None, **options)

            sockets = [come("127.0.0.2", **{"X-Forwarded-For": f"198.51.100.{number}"}) for number in range(3)]
            for one in sockets[:2]:
                await one.open()
                await one.call(client.Ping())
            with pytest.raises(InvalidStatus, match="429"):
                await sockets[2].open()
            other = come("127.0.0.3")
            await other.open()
            await other.call(client.Ping())
            for one in (*sockets[:2], other):
                await one.close()
            with pytest.raises(InvalidStatus, match="403"):
                await Client(url, None, headers=cookie, origin=url.replace("https", "http"), ssl=trust).open()

            wrong = {"email": ADA["email"], "password": "wrong horse"}
            codes = [
                (
                    await ada.post(
                        "/v1/auth/login", json=wrong, headers=page | {"X-Forwarded-For": f"203.0.113.{number}"}
                    )
                ).status_code
                for number in range(5)
            ]
            assert codes == [401, 401, 401, 429, 429]
            assert (await charles.post("/v1/auth/login", json=wrong, headers=page)).status_code == 401

        # A client that reaches the inner proxy without TLS gets a Secure cookie only if a balancer vouches for TLS.
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{inner_port}", trust_env=False) as plain:
            account = ADA | {"email": "plain@example.org"}
            assert (await plain.get("/metrics")).status_code == HTTPStatus.NOT_FOUND
            assert (await plain.get("//metrics/")).status_code != HTTPStatus.OK
            answer = await plain.post("/v1/auth/register", json=account, headers={"X-Forwarded-Proto": "gopher"})
            assert answer.status_code == HTTPStatus.CREATED
            assert "secure" not in answer.headers["set-cookie"].lower()
