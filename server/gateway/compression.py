"""Compression of large frames and answers (RFC 7692, RFC 9110).

Each message is compressed alone. So a connection keeps no state for it, and small frames stay as they are. A frame of
a connection's own costs about 25 µs per 10 KB, and shrinks to a tenth.

The size of a compressed text depends on repetitions. Who can watch the sizes, and write into the same frame, could
guess what else it contains. Padding of random length makes each guess need many more observations.
"""

import random
import zlib

from starlette.requests import Request
from starlette.responses import Response
from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory

from protocol.codec import text_frame

MIN_BYTES = 1024
"""Min bytes of a frame or an answer that is compressed."""
LEVEL = 1
"""Level of zlib. Level 6 takes three times as long for frames that are 15 % smaller."""
MAX_PADDING = 15
"""Max number of empty blocks that are added to a compressed text."""
EMPTY_BLOCK = b"\x00\x00\x00\xff\xff"
"""A stored block without data (RFC 1951, section 3.2.4)."""
LAST_BYTES = 4
"""Bytes that a compressed message leaves out at its end (RFC 7692, section 7.2.1)."""
RAW, GZIP = -zlib.MAX_WBITS, 16 + zlib.MAX_WBITS

EXTENSION = ServerPerMessageDeflateFactory(
    server_no_context_takeover=True, client_no_context_takeover=True, compress_settings={"level": LEVEL}
)
"""The extension that the server accepts. Neither side refers to earlier messages."""


def compressed_frame(payload: bytes, window_bits: int) -> bytes:
    """Return `payload` as a WebSocket text frame, compressed if it is large. No repetition is farther from the original
    than 2 to the power of `window_bits` bytes, because the client may keep only these.
    """
    if len(payload) < MIN_BYTES:
        return text_frame(payload)
    deflate = zlib.compressobj(LEVEL, zlib.DEFLATED, -window_bits)
    return text_frame(_padded(deflate, payload)[:-LAST_BYTES], is_compressed=True)


def inflated(data: bytes, most: int) -> bytes | None:
    """Return a compressed message decompressed. Return None if it is invalid, or longer than `most` bytes."""
    inflate = zlib.decompressobj(RAW)
    try:
        message = inflate.decompress(data + EMPTY_BLOCK[-LAST_BYTES:], most + 1)
    except zlib.error:
        return None
    return message if len(message) <= most else None


def gzipped(response: Response, request: Request, compressed: bytes | None = None) -> Response:
    """Compress a large response, if the client accepts that. Return the response. `compressed` is its body compressed,
    if that is known.

    It must not depend on a cookie that a page of another site could make a browser send.
    """
    body = bytes(response.body)
    response.headers["vary"] = "accept-encoding"
    if len(body) >= MIN_BYTES and _accepts_gzip(request):
        response.body = compressed or gzip(body)
        response.headers["content-encoding"] = "gzip"
        response.headers["content-length"] = str(len(response.body))
    return response


def gzip(body: bytes) -> bytes:
    """Return `body` compressed, with a random length."""
    deflate = zlib.compressobj(LEVEL, zlib.DEFLATED, GZIP)
    return _padded(deflate, body) + deflate.flush()


def _padded(deflate: "zlib._Compress", text: bytes) -> bytes:
    padding = EMPTY_BLOCK * random.randint(0, MAX_PADDING)  # noqa: S311 - an observer sees only the sum of the sizes
    return deflate.compress(text) + deflate.flush(zlib.Z_SYNC_FLUSH) + padding


def _accepts_gzip(request: Request) -> bool:
    codings = request.headers.get("accept-encoding", "").lower().split(",")
    named = dict(coding.partition(";")[::2] for coding in codings)
    return any(
        name.strip() == "gzip" and weight.replace(" ", "") not in {"q=0", "q=0.0", "q=0.00", "q=0.000"}
        for name, weight in named.items()
    )
