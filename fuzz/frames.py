"""Guided by coverage, looks for bytes that the decoder answers with anything but a frame or a refusal.

`make fuzz` runs it for a minute. It ends with a traceback, and the bytes in a file, if it finds some.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["protocol"]):
    from protocol import client, server
    from protocol.codec import decode_client, decode_server, encode, label
    from protocol.errors import Refused

UUID7 = "01a20000-0000-7000-8000-000000000001"


def one(data: bytes) -> None:
    """Decode `data` as a client's frame and as a server's; what is accepted must survive another round."""
    label(data)
    for decode in (decode_client, decode_server):
        try:
            frame = decode(data)
        except Refused as refused:
            if not refused.message:
                raise ValueError("a refusal without a word") from None
            continue
        if decode(encode(frame)) != frame:
            raise ValueError("another frame came out than went in")


def seeds(folder: Path) -> None:
    """Write a frame of each kind, more or less, and the words that they are made of."""
    words = {UUID7, "true", "null", "1e309", "\\u0000", "\\ud800"}
    for kind in (*client.ClientFrame.__args__, *server.ServerFrame.__args__):
        words |= {str(kind.__struct_config__.tag), *kind.__struct_fields__}
        fields = dict.fromkeys(kind.__struct_fields__, UUID7) | {"type": kind.__struct_config__.tag}
        (folder / str(kind.__struct_config__.tag)).write_bytes(encode(fields))
    (folder.parent / "words").write_text("".join(f'"{word}"\n'.replace("\\", "\\\\") for word in sorted(words)))


with tempfile.TemporaryDirectory() as name:
    corpus = Path(name) / "corpus"
    corpus.mkdir()
    seeds(corpus)
    atheris.Setup([*sys.argv, str(corpus), f"-dict={corpus.parent / 'words'}"], one)
    atheris.Fuzz()
