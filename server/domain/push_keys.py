"""The keys of a browser's push subscription (RFC 8291)."""

import base64

from cryptography.hazmat.primitives.asymmetric import ec

from protocol.errors import ErrorCode, Refused

POINT_BYTES = 65
"""Size of an uncompressed point of P-256 (RFC 8291)."""
SECRET_BYTES = 16
"""Size of the authentication secret of a subscription (RFC 8291)."""


def require_keys(p256dh: str, auth: str) -> None:
    """Raise Refused unless notifications can be encrypted with these keys of a browser's subscription."""
    try:
        point = from_base64url(p256dh)
        ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
        is_point = len(point) == POINT_BYTES
    except ValueError:
        is_point = False
    if not is_point:
        raise Refused(
            ErrorCode.INVALID,
            f"`p256dh` must be an uncompressed P-256 point of {POINT_BYTES} bytes, in base64url. "
            "Send the one from the browser's subscription.",
            path="p256dh",
        )
    try:
        is_secret = len(from_base64url(auth)) == SECRET_BYTES
    except ValueError:
        is_secret = False
    if not is_secret:
        raise Refused(
            ErrorCode.INVALID,
            f"`auth` must be {SECRET_BYTES} bytes in base64url. Send the one from the browser's subscription.",
            path="auth",
        )


def from_base64url(text: str) -> bytes:
    """Return the bytes that a browser wrote in base64url, with or without padding. Raises ValueError."""
    return base64.urlsafe_b64decode(text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4))
