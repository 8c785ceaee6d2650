"""The settings, which are read once. No other file reads the environment."""

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
"""Max worker processes if `workers` is 0."""
MAX_QUOTED = 60
"""Max characters of a refused value that an error quotes."""
PREFIX = "OPENCHAT_"
COMPLETION = "_OPENCHAT_COMPLETE"
"""The variable that a shell sets to complete a command."""
REPLACED = {"OPENCHAT_BEHIND_PROXY": "OPENCHAT_TRUSTED_PROXIES to the number of proxies"}
"""Variables of earlier versions, each with the setting that replaced it."""
SERVICE = re.compile(r"(OPENCHAT(?:_\w+)?)_PORT(?:_\d+_(?:TCP|UDP|SCTP))?")
"""Variables that Kubernetes sets for each Service whose name begins with `openchat`. Their values match `SERVICE_URL`.
"""
SERVICE_URL = re.compile(r"(?:tcp|udp|sctp)://")
SERVICE_PARTS = r"_(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_PROTO|_PORT|_ADDR)?)?)"
"""Endings of the variables that Kubernetes sets for a Service."""

BOTH = (
    "--data-dir and DATABASE_URL each name a database. Leave out --data-dir to use DATABASE_URL, or unset "
    "DATABASE_URL to use the folder. OPENCHAT_DATA_DIR sets the folder of an embedded Valkey."
)

_HOST = r"(\[[\w:.%]+\]|[\w.-]*)(:\d*)?"
CLEAR = re.compile(rf"(.*@)?{_HOST}(,{_HOST})*")
"""The part of a well-formed URL between `://` and the first `/`, `?` or `#`."""
PLACES = {"host", "port", "dbname", "user"}
"""Options in a database's URL that name its place or its user. They are no secrets."""

Rate: TypeAlias = Annotated[float, Meta(ge=0.1, le=1_000_000)]
"""A number per second. The bounds keep the interval between two tokens between 1 µs and ten seconds."""


class Settings(msgspec.Struct, kw_only=True, frozen=True):
    """All settings, each with its bounds and its meaning. `openchat settings` prints them.

    The environment variable of a field is OPENCHAT_ and its name in capitals. DATABASE_URL and REDIS_URL have their
    usual names.
    """

    host: Annotated[str, "Address to listen on. Put a TLS proxy in front."] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535), "TCP port to listen on. 0 selects a free one."] = 8000
    workers: Annotated[
        int,
        Meta(ge=0, le=256),
        "Number of worker processes, which share the port. 0 means one per core, at most 4.",
    ] = 0
    data_dir: Annotated[
        str,
        "Folder of the embedded PostgreSQL and Valkey. By default the user's state folder, or /var/lib/openchat for "
        "root.",
    ] = ""
    database_url: Annotated[str, "URL of PostgreSQL 15 to 18. By default the server starts its own."] = ""
    redis_url: Annotated[
        str,
        "URL of Redis 7.0 or later, or of Valkey; for a cluster, of any of its nodes. By default the server starts its "
        "own Valkey.",
    ] = ""
    origins: Annotated[str, "Other origins whose pages may use the session cookie."] = ""
    database_connections: Annotated[
        int,
        Meta(ge=2, le=500),
        "Max PostgreSQL connections of each worker, besides 5 for messages, reactions, votes, joins and `/readyz`. Set "
        "`max_connections` of your PostgreSQL to the sum for all workers, one further worker during a reload, and a "
        "few for the command line.",
    ] = 8
    session_days: Annotated[int, Meta(ge=1, le=3650), "Days without use after which a session expires."] = 30
    heartbeat_seconds: Annotated[
        float,
        Meta(ge=0.1, le=300),
        "Interval of heartbeats, per connection. A connection that is silent for two intervals is closed (4009).",
    ] = 30.0
    outbox_bytes: Annotated[
        int,
        Meta(ge=65_536, le=1_073_741_824),
        "Max bytes that wait for a slow reader, per connection. Beyond that it is closed (4008).",
    ] = 1024 * 1024
    compression: Annotated[
        bool,
        "Compress frames and answers of at least 1 KiB for clients that accept it. SECURITY.md says what their sizes "
        "can reveal to an observer of the network.",
    ] = True
    connections_per_user: Annotated[
        int,
        Meta(ge=1, le=1_000_000),
        "Max WebSockets per user and worker, and max concurrent calls (`POST /v1/call`).",
    ] = 50
    connections_per_address: Annotated[
        int, Meta(ge=1, le=1_000_000), "Max WebSockets per address and worker. A whole office may share one address."
    ] = 2_000
    address_rate: Annotated[
        Rate,
        "Max requests and new connections per second, per address and worker. Bursts: four times that. docs/limits.md "
        "has all limits.",
    ] = 500.0
    frame_rate: Annotated[
        Rate,
        "Max frames per second, per connection. Bursts: four times that. For this rate and those of users, `ready` "
        "names three times.",
    ] = 200.0
    write_rate: Annotated[Rate, "Max writing frames per second, per user at all workers. Bursts: four times that."] = (
        50.0
    )
    read_rate: Annotated[Rate, "Max reading frames per second, per user at all workers. Bursts: four times that."] = (
        100.0
    )
    ephemeral_rate: Annotated[
        Rate,
        "Max ephemeral frames (typing, presence) per second, per user at all workers. Bursts: four times that.",
    ] = 20.0
    search_rate: Annotated[
        Rate, "Max searches and pages of the feed per second, per user at all workers. Bursts: four times that."
    ] = 2.0
    login_attempts: Annotated[int, Meta(ge=1, le=1_000_000), "Max failed logins in five minutes, per account."] = 10
    login_attempts_per_address: Annotated[
        int, Meta(ge=1, le=1_000_000), "Max logins and registrations in five minutes, per address."
    ] = 100
    audit_days: Annotated[
        int,
        Meta(ge=1, le=36_500),
        "Days for which the audit logs of conversations keep an entry. The server's own audit log keeps all entries "
        "(docs/administration.md).",
    ] = 365
    erase_after_days: Annotated[
        float,
        Meta(ge=0, le=3650),
        "Days for which a deleted account can be restored, before the user is erased (docs/administration.md).",
    ] = 30.0
    search_language: Annotated[
        str,
        "Language of the search index, such as `english`. `simple` indexes words as they are. After a change, run "
        "`openchat reindex`.",
    ] = "simple"
    registration: Annotated[
        Literal["open", "closed"],
        "Who may create an account: everybody (`open`), or only the operator, with `openchat user create` (`closed`).",
    ] = "open"
    link_previews: Annotated[bool, "Fetch the page of a message's first link, and show the page's title."] = False
    add_people: Annotated[
        Literal["by_privacy", "anyone"],
        "Who may add users to groups and channels without their consent: their friends (`by_privacy`), or everybody "
        "who may invite them, whatever their `allow_adding` says (`anyone`). Use `anyone` only in closed "
        "installations, such as a company's.",
    ] = "by_privacy"
    push_after_seconds: Annotated[
        float, Meta(ge=0, le=3600), "Seconds after which an unread message is pushed to browsers."
    ] = 5.0
    push_contact: Annotated[str, "Contact for the operators of push services. Apple's service refuses `localhost`."] = (
        "mailto:postmaster@localhost"
    )
    private_addresses: Annotated[
        bool, "Allow push endpoints and link previews at addresses of this machine and of private networks."
    ] = False
    metrics_from: Annotated[str, "Networks from which `/metrics` may be read, without a proxy in between."] = (
        "127.0.0.0/8,::1/128"
    )
    metrics_hosts: Annotated[
        str, "Names that a request of `/metrics` may have in `Host`, besides `localhost` and IP addresses."
    ] = ""
    trusted_proxies: Annotated[
        str,
        "Proxies whose `X-Forwarded-For` and `X-Forwarded-Proto` are trusted: their number, or their networks "
        "(docs/operations.md).",
    ] = ""

    @property
    def worker_count(self) -> int:
        """The number of worker processes to run."""
        return self.workers or min(os.cpu_count() or 1, MAX_DEFAULT_WORKERS)

    @property
    def data_path(self) -> Path:
        """The data folder. It may not exist yet."""
        if self.data_dir:
            return Path(self.data_dir).expanduser().absolute()
        # root's own state directory is closed to the unprivileged user that has to run PostgreSQL.
        if sys.platform == "linux" and os.geteuid() == 0:
            return Path("/var/lib/openchat")
        return Path(platformdirs.user_state_dir("openchat", appauthor=False))

    @property
    def folder_advice(self) -> str:
        """Advice to use another data folder. `--data-dir` is no advice with DATABASE_URL, because `read` refuses both
        together.
        """
        if self.database_url:
            return "choose another one by OPENCHAT_DATA_DIR, or set REDIS_URL to do without one"
        return "choose another one by --data-dir"

    @property
    def proxies(self) -> Proxies:
        """The trusted proxies. Raises ValueError if the setting is invalid."""
        return Proxies.read(self.trusted_proxies)

    @property
    def metrics_networks(self) -> tuple[Network, ...]:
        """The networks of `metrics_from`. Raises ValueError if the setting is invalid."""
        return networks(self.metrics_from) if self.metrics_from.strip() else ()

    @property
    def metrics_names(self) -> frozenset[str]:
        """The names in `metrics_hosts`, in lower case."""
        return frozenset(name.strip().lower() for name in self.metrics_hosts.split(",") if name.strip())

    @property
    def allowed_origins(self) -> frozenset[str]:
        """The additional origins, without trailing slashes."""
        return frozenset(origin.strip().rstrip("/") for origin in self.origins.split(",") if origin.strip())


def variable(field: str) -> str:
    """Return the environment variable of a setting."""
    return field.upper() if field in {"database_url", "redis_url"} else f"{PREFIX}{field.upper()}"


def option(field: str) -> str:
    """Return the command-line option of a setting. Only some settings have one."""
    return f"--{field.replace('_', '-')}"


def allowed(field: str) -> str:
    """Return the allowed values of a setting, as a phrase after "must be"."""
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
    """Return the meaning of a setting."""
    (about,) = (one for one in HINTS[field].__metadata__ if isinstance(one, str))
    return about


def source(field: str) -> str:
    """Return where `read` finds the value of a setting: `environment` or `default`."""
    return "environment" if variable(field) in os.environ else "default"


def completion() -> str:
    """Return the request of a shell that completes a command, or an empty string."""
    return os.environ.get(COMPLETION, "")


def read(**overrides: object) -> Settings:
    """Return the settings of the environment. `overrides` other than None replace them.

    Raises Fatal if a variable is unknown, or if a value is not allowed. It names the variable or option. Also raises
    Fatal if an override names a data folder and DATABASE_URL names a database.
    """
    for name in _names():
        _require_known(name)
    if overrides.get("data_dir") is not None and os.environ.get(variable("database_url")):
        raise Fatal(BOTH)
    stored: dict[str, object] = {
        field: os.environ[variable(field)] for field in FIELDS if variable(field) in os.environ
    }
    given = {field: value for field, value in overrides.items() if value is not None}
    # Variables are checked even if an option overrides them, because the next start may lack the option.
    values = [(variable(field), field, value) for field, value in stored.items()]
    values += [(option(field), field, value) for field, value in given.items()]
    for name, field, value in values:
        try:
            one = msgspec.convert({field: value}, Settings, strict=False)
            is_understood = FORMS[field](one) if field in FORMS else True
        except HostBits as error:
            raise Fatal(f"{_not_allowed(name, field, str(value))} {error}") from None
        except (msgspec.ValidationError, ValueError, RuntimeError):  # RuntimeError: no user is called `~name`
            is_understood = False
        if not is_understood:
            raise Fatal(_not_allowed(name, field, str(value)))
    return msgspec.convert(stored | given, Settings, strict=False)


def masked(url: str) -> str:
    """Return a database's URL with its user, place and name only. If it is malformed, return its scheme only."""
    scheme, _, rest = url.partition("://")
    place = re.split(r"[/?#]", rest, maxsplit=1)[0]
    # If the password contains an unescaped `/`, `?` or `#`, the rest of it looks like a path, a query or a fragment.
    if not CLEAR.fullmatch(place) or "@" in rest[len(place) :]:
        return f"{scheme}://***"
    return without_password(url)


def without_password(url: str) -> str:
    """Return a database's URL with its user, place and name only."""
    parts = urlsplit(url)
    user, has_user, place = parts.netloc.rpartition("@")
    options = [(name, value) for name, value in parse_qsl(parts.query) if name in PLACES]
    netloc = f"{user.partition(':')[0]}{has_user}{place}"
    query = urlencode(options, safe="/,")
    return f"{parts.scheme}://{netloc}{parts.path}{query and '?'}{query}"


def _names() -> list[str]:
    """Return the variables with our prefix, without those of Kubernetes Services."""
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
"""Allowed values of the text settings, as phrases after "must be"."""
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
"""Checks of the text settings. A check returns false or raises ValueError if the text is not allowed."""
