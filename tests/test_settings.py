"""Each setting has bounds, and a value beyond them stops the start with one sentence."""

import asyncio
import os
import re

import msgspec
import pytest
from msgspec.inspect import BoolType, FloatType, IntType, LiteralType

from server.cli import main
from server.core import config
from server.core.config import FIELDS, TEXTS, Settings, allowed, variable
from server.core.errors import Fatal
from server.db.database import OWN_CONNECTIONS
from server.describe.settings import document
from server.processes.supervisor import listen, prepare

NUMBERS = [name for name, field in FIELDS.items() if isinstance(field.type, (IntType, FloatType))]
HOSTILE = ["-1", "-0.1", "nan", "inf", "-inf", "1e400", "1e18", "0x10", "1_0", "many", "", " ", "1;", "9" * 400, "1\n2"]
WRONG = {
    "host": ["", " "],
    "data_dir": ["~nobody-of-this-name/data"],
    "database_url": ["nonsense", "mysql://ada:secret@host/x", "http://ada:secret@host"],
    "redis_url": ["nonsense", "localhost:6379", "http://ada:secret@host"],
    "origins": ["chat.example.org", "https://", "https://a.example,https://b.example/path", "*"],
    "search_language": ["", "english; DROP", "a.b.c"],
    "push_contact": ["", "postmaster@example.org", "http://example.org"],
    "metrics_from": ["1", "everybody", "10.0.0.1/8", "127.0.0.1,", "*"],
    "metrics_hosts": ["*", "chat-1:8000", "http://chat-1", "a b", "ä.example"],
    "trusted_proxies": ["true", "-1", "11", "1.5", "10.0.0.0/33", "10.0.0.1/8", "1,", "example.org", "*"],
}
"""Invalid values of each text setting."""


@pytest.fixture(autouse=True)
def _no_other_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OPENCHAT_") or name in {"DATABASE_URL", "REDIS_URL"}]:
        monkeypatch.delenv(name)


def refusal(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> str:
    monkeypatch.setenv(name, value)
    with pytest.raises(Fatal) as caught:
        config.read()
    monkeypatch.delenv(name)
    return str(caught.value)


def test_every_setting_has_bounds_or_a_format() -> None:
    for name, field in FIELDS.items():
        if name in NUMBERS:
            assert isinstance(field.type, (IntType, FloatType))
            assert field.type.ge is not None and field.type.le is not None, name  # noqa: PT018 - one condition
            assert field.type.ge <= field.default <= field.type.le
        else:
            assert isinstance(field.type, (BoolType, LiteralType)) or name in TEXTS, name
    assert TEXTS.keys() == WRONG.keys()
    assert config.read() == Settings()


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_bounds_are_refused_with_the_bounds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = FIELDS[name].type
    assert isinstance(kind, (IntType, FloatType))
    least, most = kind.ge, kind.le
    assert least is not None
    assert most is not None
    for value in (str(least), str(most)):
        monkeypatch.setenv(variable(name), value)
        assert str(getattr(config.read(), name)) in {value, f"{value}.0"}
    beyond = [str(least - 1), str(most + 1), *(["0"] if least > 0 else [])]
    for value in HOSTILE + beyond + (["1.5"] if isinstance(kind, IntType) else []):
        said = refusal(monkeypatch, variable(name), value)
        shown = value if len(value) < 60 else value[:60]
        assert said.startswith(f"{variable(name)} must be {allowed(name)}, not '{shown}"), (value, said)
        assert str(least) in said
        assert str(most) in said


@pytest.mark.parametrize(("name", "good"), [("host", "::1"), ("port", 8099), ("workers", 1), ("data_dir", "/x")])
def test_invalid_value_is_refused_even_if_an_argument_overrides_it(
    name: str, good: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in WRONG.get(name, ["-1", "99999"]):
        monkeypatch.setenv(variable(name), value)
        with pytest.raises(Fatal, match=f"^{variable(name)} must be "):
            config.read(**{name: good})
    monkeypatch.setenv(variable(name), "7")
    assert getattr(config.read(**{name: good}), name) == good


def test_error_about_a_url_names_every_accepted_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in config.SECRET:
        taken = [f"{one}://" for one in ("postgresql", "postgres", "redis", "rediss", "unix", "mysql", "http")]
        for scheme in taken:
            monkeypatch.setenv(variable(name), f"{scheme}ada/chat")
            said = re.findall(r"[a-z]+://", allowed(name))
            if scheme in said:
                config.read()
            else:
                assert "must be" in refusal(monkeypatch, variable(name), f"{scheme}ada/chat")
        monkeypatch.delenv(variable(name), raising=False)


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in NUMBERS])
def test_invalid_values_are_refused_with_the_allowed_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in WRONG.get(name, ["", "perhaps", "2", "True ", "on;"]):
        said = refusal(monkeypatch, variable(name), value)
        assert said.startswith(f"{variable(name)} must be {allowed(name)}"), (value, said)
        assert ("secret" not in said) if name in config.SECRET else (f"not '{value}'" in said)


@pytest.mark.parametrize("name", ["metrics_from", "trusted_proxies"])
def test_address_with_host_bits_is_refused_with_both_corrections(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, network, address in (
        ("10.0.0.1/8", "10.0.0.0/8", "10.0.0.1/32"), ("127.0.0.0/8, fd00::1/8", "fd00::/8", "fd00::1/128"),
    ):  # fmt: skip
        said = refusal(monkeypatch, variable(name), value)
        assert said.startswith(f"{variable(name)} must be {allowed(name)}, not '{value}'. "), said
        assert said.endswith(f"Give {network}, or {address} for that address alone."), said
        monkeypatch.setenv(variable(name), f"{network},{address}")
        assert getattr(config.read(), name) == f"{network},{address}"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("OPENCHAT_REGISTRATON", "is not a setting. Rename it to OPENCHAT_REGISTRATION, or unset it."),
        ("OPENCHAT_WORKER", "is not a setting. Rename it to OPENCHAT_WORKERS, or unset it."),
        ("OPENCHAT_DATABASE_URL", "is not a setting. Rename it to DATABASE_URL, or unset it."),
        ("OPENCHAT_XYZZY", "is not a setting. Correct its name, or unset it."),
        ("OPENCHAT_workers", "Rename it to OPENCHAT_WORKERS"),
        ("openchat_workers", "Rename it to OPENCHAT_WORKERS"),
        ("OPENCHAT_HTTP_PORT", "Rename it to OPENCHAT_PORT"),
        ("OPENCHAT_SERVICE_HOST", "is not a setting."),
        ("OPENCHAT_BEHIND_PROXY", "Set OPENCHAT_TRUSTED_PROXIES"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_known_one(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = refusal(monkeypatch, name, "1")
    assert text.startswith(name)
    assert said in text


SERVICE = {
    "SERVICE_HOST": "10.0.0.1",
    "SERVICE_PORT": "8000",
    "SERVICE_PORT_HTTP": "8000",
    "PORT": "tcp://10.0.0.1:8000",
    "PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "PORT_8000_TCP_PROTO": "tcp",
    "PORT_8000_TCP_PORT": "8000",
    "PORT_8000_TCP_ADDR": "10.0.0.1",
    "PORT_53_UDP": "udp://10.0.0.1:53",
    "PORT_53_UDP_ADDR": "10.0.0.1",
    "PORT_9_SCTP": "sctp://10.0.0.1:9",
    "PORT_9_SCTP_PORT": "9",
}
"""The variables that Kubernetes sets for one Service, without its prefix."""


@pytest.mark.parametrize("service", ["OPENCHAT", "OPENCHAT_BALANCER", "OPENCHAT_PORT_80"])
def test_variables_of_a_kubernetes_service_are_not_settings(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SERVICE.items():
        monkeypatch.setenv(f"{service}_{name}", value)
    if service == "OPENCHAT":
        with pytest.raises(Fatal, match="enableServiceLinks"):
            config.read()
        monkeypatch.setenv("OPENCHAT_PORT", "9000")  # a pod may override the colliding variable
        assert config.read() == Settings(port=9000)
    else:
        assert config.read() == Settings()
    assert "is not a setting" in refusal(monkeypatch, f"{service}_WORKRS", "3"), (
        "service variables do not hide misspelt settings"
    )
    assert "is not a setting" in refusal(monkeypatch, f"{service}_X_SERVICE_HOST", "10.0.0.1"), (
        "variables of another Service are not accepted"
    )


@pytest.mark.parametrize("name", SERVICE)
def test_names_of_a_kubernetes_service_without_its_links_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("9000", "http://10.0.0.1:9000", ""):
        assert "is not a setting" in refusal(monkeypatch, f"OPENCHAT_HTTP_{name}", value)


def test_invalid_setting_stops_every_command_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENCHAT_WRITE_RATE", "0")
    assert main.run(["check"]) == 1
    assert re.fullmatch(r"openchat: OPENCHAT_WRITE_RATE must be [^\n]*\n", capsys.readouterr().err)


def test_invalid_host_name_is_refused() -> None:
    for host in ("a..b", "x" * 70, "no.such.name.invalid"):
        with pytest.raises(Fatal, match="--host"):
            listen(host, 0, 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"search_language": "klingon"}, "not 'klingon'.*english"),
        ({"redis_url": "redis://ada:secret@host:port/0"}, "REDIS_URL is invalid"),
        ({"database_url": "postgresql://ada:se@cret@host:port/x"}, "DATABASE_URL is invalid"),
    ],
)
async def test_error_detected_by_a_database_is_one_sentence(
    settings: Settings, changes: dict[str, str], said: str
) -> None:
    with pytest.raises(Fatal, match=rf"^{said if changes.keys() != {'search_language'} else '.*' + said}") as caught:
        await asyncio.wait_for(prepare(msgspec.structs.replace(settings, **changes)), 20)
    assert "cret" not in str(caught.value)


def test_the_table_of_settings_has_a_row_for_each_with_its_default_and_its_bounds() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| .+ \|$", document(), re.MULTILINE)
    words = {"": "none", "True": "true", "False": "false"}
    defaults = {name: words.get(str(field.default), str(field.default)) for name, field in FIELDS.items()}
    assert rows == [(variable(name), defaults[name], allowed(name)) for name in FIELDS]
    assert f"besides {OWN_CONNECTIONS} for messages" in config.meaning("database_connections")


def test_settings_command_prints_meaning_default_value_and_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENCHAT_PORT", "9000")
    assert main.run(["settings", "--json"]) == 0
    rows = {row["name"]: row for row in msgspec.json.decode(capsys.readouterr().out)}
    assert list(rows) == [variable(name) for name in FIELDS]
    for name, row in zip(FIELDS, rows.values(), strict=True):
        assert (row["allowed"], row["meaning"]) == (allowed(name), config.meaning(name))
        assert re.fullmatch(r"[A-Z].*\.", row["meaning"]), name
        assert row["value"] == ("9000" if name == "port" else row["default"])
        assert row["source"] == ("environment" if name == "port" else "default")
    assert rows["OPENCHAT_LINK_PREVIEWS"]["default"] == "false"
    assert main.run(["settings"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(FIELDS) + 1, "a heading and a line per setting"
    (port,) = (line for line in lines if line.startswith("OPENCHAT_PORT "))
    assert re.fullmatch(r"OPENCHAT_PORT +9000 +environment +8000 +a whole number from 0 to 65535 +TCP port .*", port)
    assert main.run(["settings", "write"]) == 0
    assert capsys.readouterr().out.count("\n") == 2
    assert main.run(["settings", "--data-dir", "/srv/chat", "data_dir", "--json"]) == 0
    (row,) = msgspec.json.decode(capsys.readouterr().out)
    assert (row["value"], row["source"]) == ("/srv/chat", "argument")
    monkeypatch.setenv("OPENCHAT_PORT", "many")
    assert main.run(["settings"]) == 1
    assert capsys.readouterr().err.startswith("openchat: OPENCHAT_PORT must be ")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://ada:secret@db:5432/chat?password=secret&host=/run", "postgresql://ada@db:5432/chat?host=/run"),
        ("postgresql://ada:se@cret@db/chat", "postgresql://ada@db/chat"),
        ("postgresql://ada@a:1,b:2/chat", "postgresql://ada@a:1,b:2/chat"),
        ("postgresql://[::1]:5432/chat", "postgresql://[::1]:5432/chat"),
        ("postgresql:///chat", "postgresql:///chat"),
        *((f"postgresql://ada:{secret}@db/chat", "postgresql://***")
          for secret in ("secret/x", "12/secret", "12?secret", "secret#x", "12#secret")),
        ("postgresql://ada:secret", "postgresql://***"),
    ],
)  # fmt: skip
def test_passwords_are_never_shown(
    url: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in config.SECRET:
        other = url.replace("postgresql", "redis") if name == "redis_url" else url
        monkeypatch.setenv(variable(name), other)
        assert main.run(["settings"]) == 0
        printed = capsys.readouterr().out
        assert f" {shown.replace('postgresql', 'redis') if name == 'redis_url' else shown} " in printed
        assert "secret" not in printed
        assert "cret@" not in printed
        monkeypatch.delenv(variable(name))
