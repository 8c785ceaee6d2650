"""The settings, read once: the only file that reads the environment."""

import difflib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeAlias
from urllib.parse import parse_qsl, urlencode, urlsplit

import msgspec
import platformdirs
from msgspec import Meta

from server.core.errors import Fatal
from server.core.proxies import MAX_COUNT, HostBits, Network, Proxies, networks

MAX_DEFAULT_WORKERS = 4
MAX_QUOTED = 60
"""Max characters of a refused value that are quoted."""
PREFIX = "OPENCHAT_"
REPLACED = {"OPENCHAT_BEHIND_PROXY": "OPENCHAT_TRUSTED_PROXIES to the number of proxies"}
"""Variables of earlier versions, and what to set instead."""
SERVICE = re.compile(r"(OPENCHAT(?:_\w+)?)_PORT(?:_\d+_(?:TCP|UDP|SCTP))?")
"""Variables that Kubernetes sets to a URL of `SERVICE_URL` for each Service whose name begins with `openchat`."""
SERVICE_URL = re.compile(r"(?:tcp|udp|sctp)://")
SERVICE_PARTS = r"_(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_PROTO|_PORT|_ADDR)?)?)"
"""Ends of the names of all variables that Kubernetes sets for a Service."""

BOTH = (
    "--data-dir and DATABASE_URL each name a database. Leave out --data-dir to use DATABASE_URL, or unset "
    "DATABASE_URL to use the folder. OPENCHAT_DATA_DIR sets the folder of an embedded Valkey."
)

PLACES = {"host", "port", "dbname", "user"}
"""Options in the URL of a database that say where it is, or who connects."""

Rate: TypeAlias = Annotated[float, Meta(ge=0.1, le=1_000_000)]
"""A number per second. A token bucket has no longer interval than ten seconds, and no shorter one than 1 µs."""


class Settings(msgspec.Struct, kw_only=True, frozen=True):
    """Everything that can be set. Each field's environment variable is OPENCHAT_ and its name in capitals,
    except DATABASE_URL and REDIS_URL, which are the customary ones.
    """

    host: str = "127.0.0.1"
    """The address to listen on. Loopback unless told otherwise."""
    port: Annotated[int, Meta(ge=0, le=65_535)] = 8000
    """The TCP port to listen on; 0 takes a free one."""
    workers: Annotated[int, Meta(ge=0, le=256)] = 0
    """Worker processes; 0 is one per core, up to four."""
    data_dir: str = ""
    """Where the embedded database lives; empty is the user's state directory."""
    database_url: str = ""
    """A PostgreSQL (15 or later) to use; empty starts the embedded one."""
    redis_url: str = ""
    """A Redis (7.0 or later) or Valkey to use; empty starts the embedded one."""
    origins: str = ""
    """Origins, comma-separated, that browsers may connect from besides the server's own address."""
    database_connections: Annotated[int, Meta(ge=2, le=500)] = 8
    """The most PostgreSQL connections for each worker."""
    session_days: Annotated[int, Meta(ge=1, le=3650)] = 30
    """A session ends after this many days without use."""
    heartbeat_seconds: Annotated[float, Meta(ge=0.1, le=300)] = 30.0
    """How often each connection hears from the server; silence for two of them closes it."""
    outbox_bytes: Annotated[int, Meta(ge=65_536, le=1_073_741_824)] = 1024 * 1024
    """How many bytes may wait for a slow reader before it is closed."""
    connections_per_user: Annotated[int, Meta(ge=1, le=1_000_000)] = 50
    """The most connections of one user to one worker."""
    connections_per_address: Annotated[int, Meta(ge=1, le=1_000_000)] = 2_000
    """The most connections from one address to one worker: an office may be behind one."""
    address_rate: Rate = 500.0
    """Requests and new connections a second from each address to each worker, on average; bursts of four times that."""
    frame_rate: Rate = 200.0
    """Frames a second on each connection, of all kinds, on average; bursts of four times that."""
    write_rate: Rate = 50.0
    """Writing frames a second for each user at all workers, on average; bursts of four times that."""
    read_rate: Rate = 100.0
    """Reading frames a second for each user at all workers, on average; bursts of four times that."""
    ephemeral_rate: Rate = 20.0
    """Typing and presence frames a second for each user at all workers, on average; bursts of four times that."""
    search_rate: Rate = 2.0
    """Searches a second for each user at all workers, on average; bursts of four times that."""
    login_attempts: Annotated[int, Meta(ge=1, le=1_000_000)] = 10
    """Failed logins in five minutes for one account before it has to wait."""
    login_attempts_per_address: Annotated[int, Meta(ge=1, le=1_000_000)] = 100
    """Logins and registrations in five minutes from one address before it has to wait."""
    audit_days: Annotated[int, Meta(ge=1, le=36_500)] = 365
    """How many days entries of the audit logs of conversations are kept. The server's own log is kept."""
    erase_after_days: Annotated[float, Meta(ge=0, le=3650)] = 30.0
    """How long a deleted account waits, and may come back, before the person is erased."""
    search_language: str = "simple"
    """The language of the words that are searched for, such as `english`: a text search configuration of PostgreSQL.
    `simple` leaves words as they are. After a change, run `openchat reindex`.
    """
    registration: Literal["open", "closed"] = "open"
    """Who may make an account: everybody, or, if `closed`, the operator alone by `openchat user create`."""
    link_previews: bool = False
    """Ask for the page behind the first link of a message, and show what it says of itself."""
    add_people: Literal["by_privacy", "anyone"] = "by_privacy"
    """Who is added to groups and channels without being asked: `by_privacy`, by friends alone (docs/privacy.md);
    `anyone`, by everybody who may invite them, for an installation in which all know each other, such as a company's.
    """
    push_after_seconds: Annotated[float, Meta(ge=0, le=3600)] = 5.0
    """What is not read for so long after it was sent is pushed to browsers that want notifications."""
    push_contact: str = "mailto:postmaster@localhost"
    """How the operators of push services reach this server's: mailto: or https:. Apple's refuses `localhost`."""
    private_addresses: bool = False
    """Let push endpoints and previews be at addresses of this machine and its network."""
    metrics_from: str = "127.0.0.0/8,::1/128"
    """The networks from which `/metrics` may be read, directly and not through a proxy. Empty is none."""
    metrics_hosts: str = ""
    """Names, comma-separated, by which `/metrics` may be asked for besides `localhost` and IP addresses."""
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
    def folder_advice(self) -> str:
        """How to do without this data folder: --data-dir is refused where DATABASE_URL names the database."""
        if self.database_url:
            return "choose another one by OPENCHAT_DATA_DIR, or set REDIS_URL to do without one"
        return "choose another one by --data-dir"

    @property
    def proxies(self) -> Proxies:
        """The trusted proxies. Raises ValueError if the setting is not understood."""
        return Proxies.read(self.trusted_proxies)

    @property
    def metrics_networks(self) -> tuple[Network, ...]:
        """The networks of `metrics_from`. Raises ValueError if the setting is not understood."""
        return networks(self.metrics_from) if self.metrics_from.strip() else ()

    @property
    def metrics_names(self) -> frozenset[str]:
        """The names of `metrics_hosts`, in lower case."""
        return frozenset(name.strip().lower() for name in self.metrics_hosts.split(",") if name.strip())

    @property
    def allowed_origins(self) -> frozenset[str]:
        """The extra origins, without trailing slashes."""
        return frozenset(origin.strip().rstrip("/") for origin in self.origins.split(",") if origin.strip())


def variable(field: str) -> str:
    """Return the name of the environment variable of a setting."""
    return field.upper() if field in {"database_url", "redis_url"} else f"{PREFIX}{field.upper()}"


def allowed(field: str) -> str:
    """Return which values a setting may have."""
    if field in TEXTS:
        return TEXTS[field]
    kind = FIELDS[field].type
    if isinstance(kind, msgspec.inspect.LiteralType):
        return " or ".join(f"`{value}`" for value in kind.values)
    if isinstance(kind, msgspec.inspect.BoolType):
        return "`true` or `false`"
    assert isinstance(kind, (msgspec.inspect.IntType, msgspec.inspect.FloatType))  # noqa: S101 - tests/test_settings.py
    number = "a whole number" if isinstance(kind, msgspec.inspect.IntType) else "a number"
    return f"{number} from {kind.ge} to {kind.le}"


def read(**overrides: object) -> Settings:
    """Return the settings from the environment, with `overrides` (those that are not None) on top.

    Raises Fatal, naming the variable, if one is unknown or has a value that is not allowed, and if an override names a
    data folder while DATABASE_URL names a database.
    """
    for name in _names():
        _require_known(name)
    if overrides.get("data_dir") is not None and os.environ.get(variable("database_url")):
        raise Fatal(BOTH)
    stored: dict[str, object] = {
        field: os.environ[variable(field)] for field in FIELDS if variable(field) in os.environ
    }
    given = {field: value for field, value in overrides.items() if value is not None}
    # A variable that an argument overrides today may count tomorrow.
    for field, value in (*stored.items(), *given.items()):
        try:
            one = msgspec.convert({field: value}, Settings, strict=False)
            is_understood = FORMS[field](one) if field in FORMS else True
        except HostBits as error:
            raise Fatal(f"{_not_allowed(field, str(value))} {error}") from None
        except (msgspec.ValidationError, ValueError, RuntimeError):  # the last for the folder of a user there is not
            is_understood = False
        if not is_understood:
            raise Fatal(_not_allowed(field, str(value)))
    return msgspec.convert(stored | given, Settings, strict=False)


def without_password(url: str) -> str:
    """Return the URL of a database with nothing but its user, its place and its name."""
    parts = urlsplit(url)
    user, has_user, place = parts.netloc.rpartition("@")
    options = [(name, value) for name, value in parse_qsl(parts.query) if name in PLACES]
    netloc = f"{user.partition(':')[0]}{has_user}{place}"
    query = urlencode(options, safe="/")
    return f"{parts.scheme}://{netloc}{parts.path}{query and '?'}{query}"


def _names() -> list[str]:
    """Return the variables that may be meant as settings: all with our prefix, but those of Kubernetes Services."""
    ours = {name: value for name, value in os.environ.items() if name.upper().startswith(PREFIX)}
    found = (SERVICE.fullmatch(name) for name, value in ours.items() if SERVICE_URL.match(value))
    services = "|".join({re.escape(match[1]) for match in found if match})
    link = re.compile(f"(?:{services}){SERVICE_PARTS}" if services else r"(?!)")
    return [name for name in ours if not link.fullmatch(name)]


def _require_known(name: str) -> None:
    known = [variable(field) for field in FIELDS]
    if name in known:
        return
    if name in REPLACED:
        raise Fatal(f"{name} was replaced. Set {REPLACED[name]}.")
    bare = name[len(PREFIX) :].upper()
    near = [bare] if bare in known else map(variable, difflib.get_close_matches(bare.lower(), FIELDS, n=1))
    advice = next((f"Rename it to {other}" for other in near), "Correct its name")
    raise Fatal(f"{name} is not a setting. {advice}, or unset it.")


def _is_origin(origin: str) -> bool:
    parts = urlsplit(origin)
    return bool(parts.scheme and parts.hostname) and origin == f"{parts.scheme}://{parts.netloc}"


def _not_allowed(field: str, value: str) -> str:
    sentence = f"{variable(field)} must be {allowed(field)}"
    if field in SECRET:
        return f"{sentence}. The given value is not shown, because it may contain a password."
    link = " Kubernetes sets it for a Service named `openchat`. Set `enableServiceLinks: false`."
    quoted = value if len(value) <= MAX_QUOTED else f"{value[:MAX_QUOTED]}…"
    return f"{sentence}, not '{quoted}'.{link if value.startswith('tcp://') else ''}"


FIELDS = {field.name: field for field in msgspec.inspect.type_info(Settings).fields}  # type: ignore[attr-defined]
SECRET = {"database_url", "redis_url"}
TEXTS = {
    "host": "an address or a name of this machine",
    "data_dir": "a folder",
    "database_url": "empty, or a URL that begins with postgresql:// or postgres://",
    "redis_url": "empty, or a URL that begins with redis://, rediss:// or unix://",
    "origins": "origins such as https://chat.example.org, separated by commas",
    "search_language": "a text search configuration of PostgreSQL",
    "push_contact": "a URL that begins with mailto: or https://",
    "metrics_from": "empty, or networks such as 10.0.0.0/8, separated by commas",
    "metrics_hosts": "empty, or names such as chat-1.internal, without ports, separated by commas",
    "trusted_proxies": f"a number from 0 to {MAX_COUNT}, or networks such as 10.0.0.0/8, separated by commas",
}
"""What may be given for the settings that are texts."""
FORMS: dict[str, Callable[[Settings], object]] = {
    "host": lambda one: one.host.strip(),
    "data_dir": lambda one: one.data_path,
    "database_url": lambda one: re.match(r"(postgres(ql)?://|\Z)", one.database_url),
    "redis_url": lambda one: re.match(r"((rediss?|unix)://|\Z)", one.redis_url),
    "origins": lambda one: all(map(_is_origin, one.allowed_origins)),
    "search_language": lambda one: re.fullmatch(r"\w+(\.\w+)?", one.search_language),
    "push_contact": lambda one: re.fullmatch(r"(mailto:|https://)\S+", one.push_contact),
    "metrics_from": lambda one: one.metrics_networks is not None,
    "metrics_hosts": lambda one: all(re.fullmatch(r"[\w.-]+", name, re.ASCII) for name in one.metrics_names),
    "trusted_proxies": lambda one: one.proxies is not None,
}
"""Checks of the settings that are texts. A check returns false or raises ValueError for a text that is not allowed."""
