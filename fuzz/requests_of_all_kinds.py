"""Starts an OpenChat server, and runs schemathesis with its OpenAPI document: valid and invalid requests."""

import asyncio
import sys

import httpx

from prove.cluster import OwnCluster

CHECKS = "not_a_server_error,response_schema_conformance,status_code_conformance,content_type_conformance"
ACCOUNT = {"name": "Fuzz", "email": "fuzz@example.org", "password": "correct horse"}


async def main() -> int:
    """Return the exit status of schemathesis, 1 if it found a failure."""
    async with OwnCluster(1) as cluster, httpx.AsyncClient(trust_env=False) as http:
        token = (await http.post(f"{cluster.url}/v1/auth/register", json=ACCOUNT)).json()["token"]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "schemathesis.cli", "run", f"{cluster.url}/v1/openapi.json",
            "--header", f"Authorization: Bearer {token}", "--checks", CHECKS, "--max-examples", "200",
            # These requests would end the session that the others need.
            "--exclude-path", "/v1/auth/logout", "--exclude-method", "DELETE",
        )  # fmt: skip
        return await process.wait()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
