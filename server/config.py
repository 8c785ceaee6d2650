"""The settings, read once: the only file that reads the environment."""

import os
import sys
from pathlib import Path
from typing import Literal

import msgspec
import platformdirs

from protocol.limits import Limits
from server.errors import Fatal
from server.limits import told
from server.proxies import Proxies

MAX_DEFAULT_WORKERS = 4


class Settings(msgspec.Struct, kw_only=True, frozen=True):
    """Everything that can be set. Each field's environment variable is OPENCHAT_ and its name in capitals,
    except DATABASE_URL and REDIS_URL, which are the customary ones.
    """

    host: str = "127.0.0.1"
    """The address to listen on. Loopback unless told otherwise."""
    port: int = 8000
    """The TCP port to listen on; 0 takes a free one."""
    workers: int = 0
    """Worker processes; 0 is one per core, up to four."""
    data_dir: str = ""
    """Where the embedded database lives; empty is the user's state directory."""
    database_url: str = ""
    """A PostgreSQL (15 or later) to use; empty starts the embedded one."""
    redis_url: str = ""
    """A Redis (7.0 or later) or Valkey to use; empty starts the embedded one."""
    origins: str = ""
    """Origins, comma-separated, that browsers may connect from besides the server's own address."""
    database_connections: int = 8
    """The most PostgreSQL connections for each worker."""
    session_days: int = 30
    """A session ends after this many days without use."""
    heartbeat_seconds: float = 30.0
    """How often each connection hears from the server; silence for two of them closes it."""
    outbox_bytes: int = 1024 * 1024
    """How many bytes may wait for a slow reader before it is closed."""
    connections_per_user: int = 50
    """The most connections of one user to one worker."""
    connections_per_address: int = 2_000
    """The most connections from one address to one worker: an office may be behind one."""
    address_rate: float = 500.0
    """Requests and new connections a second from each address to each worker, on average; bursts of four times that."""
    frame_rate: float = 200.0
    """Frames a second on each connection, of all kinds, on average; bursts of four times that."""
    write_rate: float = 50.0
    """Writing frames a second for each user at all workers, on average; bursts of four times that."""
    read_rate: float = 100.0
    """Reading frames a second for each user at all workers, on average; bursts of four times that."""
    ephemeral_rate: float = 20.0
    """Typing and presence frames a second for each user at all workers, on average; bursts of four times that."""
    search_rate: float = 2.0
    """Searches a second for each user at all workers, on average; bursts of four times that."""
    login_attempts: int = 10
    """Failed logins in five minutes for one account before it has to wait."""
    login_attempts_per_address: int = 100
    """Logins and registrations in five minutes from one address before it has to wait."""
    erase_after_days: float = 30.0
    """How long a deleted account waits, and may come back, before the person is erased."""
    search_language: str = "simple"
    """The language of the words that are searched for, such as `english`: a text search configuration of PostgreSQL.
    `simple` leaves words as they are. After a change, run `openchat reindex`.
    """
    link_previews: bool = False
    """Ask for the page behind the first link of a message, and show what it says of itself."""
    add_people: Literal["by_privacy", "anyone"] = "by_privacy"
    """Who is added to groups and channels without being asked: `by_privacy`, by friends alone (docs/privacy.md);
    `anyone`, by everybody who may invite them, for an installation in which all know each other, such as a company's.
    """
    push_after_seconds: float = 5.0
    """What is not read for so long after it was sent is pushed to browsers that want notifications."""
    push_contact: str = "mailto:postmaster@localhost"
    """How the operators of push services reach this server's: mailto: or https:. Apple's refuses `localhost`."""
    private_addresses: bool = False
    """Let push endpoints and previews be at addresses of this machine and its network."""
    trusted_proxies: str = ""
    """Believe X-Forwarded-For and X-Forwarded-Proto of this many proxies in front (`1`, `2`), or of the networks that
    they are in (`10.0.0.0/8,fd00::/8`). Empty believes nobody.
    """

    @property
    def worker_count(self) -> int:
        """How many worker processes to run."""
        return self.workers or min(os.cpu_count() or 1, MAX_DEFAULT_WORKERS)

    @property
    def data_path(self) -> Path:
        """The data folder, not necessarily there yet."""
        if self.data_dir:
            return Path(self.data_dir).expanduser().absolute()
        # root's own state directory is closed to the unprivileged user that has to run PostgreSQL.
        if sys.platform == "linux" and os.geteuid() == 0:
            return Path("/var/lib/openchat")
        return Path(platformdirs.user_state_dir("openchat", appauthor=False))

    @property
    def limits(self) -> Limits:
        """What `ready` tells clients to keep to."""
        return Limits(
            frames=told(self.frame_rate),
            writes=told(self.write_rate),
            reads=told(self.read_rate),
            ephemeral=told(self.ephemeral_rate),
            searches=told(self.search_rate),
        )

    @property
    def proxies(self) -> Proxies:
        """The trusted proxies. Raises ValueError if the setting is not understood."""
        return Proxies.read(self.trusted_proxies)

    @property
    def allowed_origins(self) -> frozenset[str]:
        """The extra origins, without trailing slashes."""
        return frozenset(origin.strip().rstrip("/") for origin in self.origins.split(",") if origin.strip())


def variable(field: str) -> str:
    """Return the name of the environment variable of a setting."""
    return field.upper() if field in {"database_url", "redis_url"} else f"OPENCHAT_{field.upper()}"


def read(**overrides: object) -> Settings:
    """Return the settings from the environment, with `overrides` (those that are not None) on top.

    Raises Fatal, naming the variable, if one cannot be understood.
    """
    given: dict[str, object] = {
        field: os.environ[variable(field)] for field in Settings.__struct_fields__ if variable(field) in os.environ
    }
    if "OPENCHAT_BEHIND_PROXY" in os.environ:
        raise Fatal("OPENCHAT_BEHIND_PROXY was replaced. Set OPENCHAT_TRUSTED_PROXIES to the number of proxies.")
    given |= {field: value for field, value in overrides.items() if value is not None}
    for field in given:
        try:
            msgspec.convert({field: given[field]}, Settings, strict=False)
        except msgspec.ValidationError as error:
            raise Fatal(f"{variable(field)} is not understood: {error}.") from None
    settings = msgspec.convert(given, Settings, strict=False)
    try:
        _ = settings.proxies
    except ValueError as error:
        raise Fatal(f"{variable('trusted_proxies')} is not understood: {error}.") from None
    return settings
