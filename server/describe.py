"""The documents that describe the wire to machines: AsyncAPI 3 for the socket, OpenAPI 3.1 for HTTP."""


def asyncapi() -> bytes:
    return b"{}"


def openapi() -> bytes:
    return b"{}"
