"""The rate limits in `ready`."""

from protocol.limits import Limits, RateLimit
from server.core.config import Settings
from server.limits.token_bucket import Pace


def advertised(settings: Settings) -> Limits:
    """Return the rate limits of a user. A client that keeps to them is never refused with `rate_limited`."""
    return Limits(
        frames=rate_limit(settings.frame_rate),
        writes=rate_limit(settings.write_rate),
        reads=rate_limit(settings.read_rate),
        ephemeral=rate_limit(settings.ephemeral_rate),
        searches=rate_limit(settings.search_rate),
    )


def rate_limit(rate: float) -> RateLimit:
    """Return the rate and its burst. The burst lacks one second of what the bucket holds, because frames may arrive
    closer together than they were sent.
    """
    return RateLimit(per_second=rate, burst=Pace.of(rate).most)
