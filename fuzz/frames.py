"""Coverage-guided fuzzing of the decoder. It searches for bytes that lead to neither a frame nor a refusal.

`make fuzz` runs it for a minute. If it finds such bytes, it ends with a traceback and writes them to a file.
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
    """Decode `data` as a client's frame and as a server's. An accepted frame must survive encoding and decoding."""
    label(data)
    for decode in (decode_client, decode_server):
        try:
            frame = decode(data)
        except Refused as refused:
            if not refused.message:
                raise ValueError("a refusal without a message") from None
            continue
        if decode(encode(frame)) != frame:
            raise ValueError("the frame changed by encoding and decoding")


def seeds(folder: Path) -> None:
    """Write an approximate frame of each kind, and the dictionary of tags and fields."""
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
