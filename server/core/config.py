"""The settings, read once: the only file that reads the environment."""

import difflib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, get_type_hints
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
COMPLETION = "_OPENCHAT_COMPLETE"
"""Variable that a shell sets when it completes a command."""
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

_HOST = r"(\[[\w:.%]+\]|[\w.-]*)(:\d*)?"
CLEAR = re.compile(rf"(.*@)?{_HOST}(,{_HOST})*")
"""What stands between `://` and the first `/`, `?` or `#` of a URL that is well-formed."""
PLACES = {"host", "port", "dbname", "user"}
"""Options in the URL of a database that say where it is, or who connects."""

Rate: TypeAlias = Annotated[float, Meta(ge=0.1, le=1_000_000)]
"""A number per second. A token bucket has no longer interval than ten seconds, and no shorter one than 1 µs."""


class Settings(msgspec.Struct, kw_only=True, frozen=True):
    """Everything that can be set, each with its bounds and its meaning, which `openchat settings` prints. A field's
    environment variable is OPENCHAT_ and its name in capitals; DATABASE_URL and REDIS_URL have their usual names.
    """

    host: Annotated[str, "Address to listen on."] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535), "TCP port to listen on; 0 takes a free one."] = 8000
    workers: Annotated[int, Meta(ge=0, le=256), "Worker processes; 0 is one per core, at most 4."] = 0
    data_dir: Annotated[
        str,
        "Folder of the embedded database and Valkey. By default the user's state folder, or /var/lib/openchat for "
        "root.",
    ] = ""
    database_url: Annotated[str, "PostgreSQL, 15 or later. By default the server starts its own."] = ""
    redis_url: Annotated[str, "Redis, 7.0 or later, or Valkey. By default the server starts its own."] = ""
    origins: Annotated[str, "Other origins whose pages may use the session cookie, separated by commas."] = ""
    database_connections: Annotated[int, Meta(ge=2, le=500), "Max PostgreSQL connections, per worker."] = 8
    session_days: Annotated[int, Meta(ge=1, le=3650), "Days without use after which a session ends."] = 30
    heartbeat_seconds: Annotated[
        float, Meta(ge=0.1, le=300), "Interval of heartbeats, per connection. Silence for two of them closes it."
    ] = 30.0
    outbox_bytes: Annotated[
        int, Meta(ge=65_536, le=1_073_741_824), "Max bytes that wait for a slow reader before it is closed."
    ] = 1024 * 1024
    connections_per_user: Annotated[
        int, Meta(ge=1, le=1_000_000), "Max WebSockets of a user, and max calls in flight, per worker."
    ] = 50
    connections_per_address: Annotated[
        int, Meta(ge=1, le=1_000_000), "Max connections from an address, per worker. An office may be behind one."
    ] = 2_000
    address_rate: Annotated[
        Rate, "Max requests and new connections per second from an address, per worker. Bursts: four times that."
    ] = 500.0
    frame_rate: Annotated[Rate, "Max frames per second, per connection. Bursts: four times that."] = 200.0
    write_rate: Annotated[Rate, "Max writing frames per second, per user. Bursts: four times that."] = 50.0
    read_rate: Annotated[Rate, "Max reading frames per second, per user. Bursts: four times that."] = 100.0
    ephemeral_rate: Annotated[Rate, "Max typing and presence frames per second, per user. Bursts: four times that."] = (
        20.0
    )
    search_rate: Annotated[Rate, "Max searches per second, per user. Bursts: four times that."] = 2.0
    login_attempts: Annotated[int, Meta(ge=1, le=1_000_000), "Max failed logins in five minutes, per account."] = 10
    login_attempts_per_address: Annotated[
        int, Meta(ge=1, le=1_000_000), "Max logins and registrations in five minutes, per address."
    ] = 100
    audit_days: Annotated[
        int,
        Meta(ge=1, le=36_500),
        "Days that entries of the audit logs of conversations are kept. The server's own log is kept for ever.",
    ] = 365
    erase_after_days: Annotated[
        float, Meta(ge=0, le=3650), "Days that a deleted account may come back before the person is erased."
    ] = 30.0
    search_language: Annotated[
        str,
        "Language of the search index, such as `english`: a text search configuration of PostgreSQL. `simple` leaves "
        "words as they are. After a change, run `openchat reindex`.",
    ] = "simple"
    registration: Annotated[
        Literal["open", "closed"],
        "Who may make an account: everybody, or, if `closed`, the operator alone with `openchat user create`.",
    ] = "open"
    link_previews: Annotated[bool, "Fetch the page behind the first link of a message and show its title."] = False
    add_people: Annotated[
        Literal["by_privacy", "anyone"],
        "Who adds users to groups and channels without asking them: `by_privacy`, their friends; `anyone`, everybody "
        "who may invite them. `anyone` is for closed installations, such as a company's.",
    ] = "by_privacy"
    push_after_seconds: Annotated[
        float, Meta(ge=0, le=3600), "Seconds after which an unread message is pushed to browsers."
    ] = 5.0
    push_contact: Annotated[
        str, "How operators of push services reach you: mailto: or https:. Apple's refuses `localhost`."
    ] = "mailto:postmaster@localhost"
    private_addresses: Annotated[
        bool, "Allow push endpoints and link previews at addresses of this machine and its network."
    ] = False
    metrics_from: Annotated[str, "Networks from which `/metrics` may be read, directly and not through a proxy."] = (
        "127.0.0.0/8,::1/128"
    )
    metrics_hosts: Annotated[
        str, "Names in `Host` by which `/metrics` may be read, besides `localhost` and IP addresses."
    ] = ""
    trusted_proxies: Annotated[
        str,
        "Proxies whose X-Forwarded-For and X-Forwarded-Proto are believed: how many are in front (`1`, `2`), or their "
        "networks (`10.0.0.0/8,fd00::/8`).",
    ] = ""

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


def option(field: str) -> str:
    """Return the name of a setting's option, if it has one."""
    return f"--{field.replace('_', '-')}"


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


def meaning(field: str) -> str:
    """Return what a setting is for."""
    (about,) = (one for one in HINTS[field].__metadata__ if isinstance(one, str))
    return about


def source(field: str) -> str:
    """Return where `read` finds the value of a setting."""
    return "environment" if variable(field) in os.environ else "default"


def completion() -> str:
    """Return what a shell that completes a command asks for; empty if none does."""
    return os.environ.get(COMPLETION, "")


def read(**overrides: object) -> Settings:
    """Return the settings from the environment, with `overrides` (those that are not None) on top.

    Raises Fatal if a variable is unknown, if a value is not allowed (naming its variable, or its option), and if an
    override names a data folder while DATABASE_URL names a database.
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
    values = [(variable(field), field, value) for field, value in stored.items()]
    values += [(option(field), field, value) for field, value in given.items()]
    for name, field, value in values:
        try:
            one = msgspec.convert({field: value}, Settings, strict=False)
            is_understood = FORMS[field](one) if field in FORMS else True
        except HostBits as error:
            raise Fatal(f"{_not_allowed(name, field, str(value))} {error}") from None
        except (msgspec.ValidationError, ValueError, RuntimeError):  # the last for the folder of a user there is not
            is_understood = False
        if not is_understood:
            raise Fatal(_not_allowed(name, field, str(value)))
    return msgspec.convert(stored | given, Settings, strict=False)


def masked(url: str) -> str:
    """Return the URL of a database as it may be shown: where it is and who connects, nothing else."""
    scheme, _, rest = url.partition("://")
    place = re.split(r"[/?#]", rest, maxsplit=1)[0]
    # A character that should have been escaped makes a part of a password look like a part of something else.
    if not CLEAR.fullmatch(place) or "@" in rest[len(place) :]:
        return f"{scheme}://***"
    return without_password(url)


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


def _not_allowed(name: str, field: str, value: str) -> str:
    sentence = f"{name} must be {allowed(field)}"
    if field in SECRET:
        return f"{sentence}. The given value is not shown, because it may contain a password."
    link = " Kubernetes sets it for a Service named `openchat`. Set `enableServiceLinks: false`."
    quoted = value if len(value) <= MAX_QUOTED else f"{value[:MAX_QUOTED]}…"
    return f"{sentence}, not '{quoted}'.{link if value.startswith('tcp://') else ''}"


HINTS = get_type_hints(Settings, include_extras=True)
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
