import asyncio
import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from aiohttp import web
from yarl import URL

from aiohttp_smg_routing import ConfigError, RoutingConfig
from aiohttp_smg_routing.config import as_config

GATEWAY = "http://10.0.0.1:30000"
CHAT = "/v1/chat/completions"


def faults(**values: Any) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        RoutingConfig.from_mapping({"gateway": GATEWAY, **values})
    return dict(caught.value.faults)


def test_defaults() -> None:
    config = RoutingConfig(GATEWAY)
    assert config.enabled is True
    assert config.session_id == ("match_info:session_id",)
    assert config.paths == (CHAT,)
    assert config.header == "X-SMG-Routing-Key"
    assert config.key == "session_id"
    assert config.secret is None
    assert config.on_missing == "pass"
    assert config.client_session == ()
    assert config.ignore_ids == ()
    assert config.prefix == ""


def test_config_is_frozen_and_slotted() -> None:
    config = RoutingConfig(GATEWAY)
    with pytest.raises(FrozenInstanceError):
        config.enabled = False  # type: ignore[misc]
    assert not hasattr(config, "__dict__")


def test_equal_configs_compare_equal_however_they_are_written() -> None:
    config = RoutingConfig("http://GATEWAY:80/", session_id="header:X", paths="/v1/completions")
    same = RoutingConfig(
        [URL("http://gateway")], session_id=["header:X"], paths=["/v1/completions"]
    )
    assert config == same
    assert hash(config) == hash(same)
    assert config != replace(config, key="digest")


def test_config_survives_a_trip_to_another_process() -> None:
    config = RoutingConfig(GATEWAY, session_id="header:X", key="digest", secret="s")
    copy = pickle.loads(pickle.dumps(config))  # noqa: S301
    assert copy == config
    assert copy.tags("POST", URL(GATEWAY + CHAT))


@pytest.mark.parametrize(
    ("gateway", "method", "url", "tagged"),
    [
        (GATEWAY, "POST", GATEWAY + CHAT, True),
        (GATEWAY, "POST", f"http://user:pw@10.0.0.1:30000{CHAT}?a=b#c", True),
        (GATEWAY, "GET", GATEWAY + CHAT, False),
        (GATEWAY, "PUT", GATEWAY + CHAT, False),
        (GATEWAY, "POST", f"https://10.0.0.1:30000{CHAT}", False),
        (GATEWAY, "POST", f"ws://10.0.0.1:30000{CHAT}", False),
        (GATEWAY, "POST", f"http://10.0.0.1:30001{CHAT}", False),
        (GATEWAY, "POST", f"http://10.0.0.1{CHAT}", False),
        (GATEWAY, "POST", f"http://10.0.0.1:30000@evil{CHAT}", False),
        (GATEWAY, "POST", f"http://10.0.0.1.evil:30000{CHAT}", False),
        (GATEWAY, "POST", f"{GATEWAY}{CHAT}/", False),
        (GATEWAY, "POST", f"{GATEWAY}/{CHAT}", False),
        (GATEWAY, "POST", f"{GATEWAY}{CHAT}x", False),
        (GATEWAY, "POST", f"{GATEWAY}{CHAT.upper()}", False),
        (GATEWAY, "POST", f"{GATEWAY}/v1/models", False),
        (GATEWAY, "POST", f"{GATEWAY}/v1/chat%2Fcompletions", False),
        (GATEWAY, "POST", f"{GATEWAY}/v1/../v1/chat/completions", True),
        (GATEWAY, "POST", f"{GATEWAY}/base{CHAT}", False),
        (GATEWAY + "/base", "POST", f"{GATEWAY}/base{CHAT}", True),
        (GATEWAY + "/base/", "POST", f"{GATEWAY}/base{CHAT}", True),
        (GATEWAY + "/base", "POST", GATEWAY + CHAT, False),
        (GATEWAY + "/a%20b", "POST", f"{GATEWAY}/a b{CHAT}", True),
        ("http://gateway", "POST", f"http://GATEWAY:80{CHAT}", True),
        ("https://gateway:443", "POST", f"https://gateway{CHAT}", True),
        ("http://user:pw@gateway", "POST", f"http://gateway{CHAT}", True),
        ("http://[::1]:30000", "POST", f"http://[::1]:30000{CHAT}", True),
        ("http://bücher", "POST", f"http://xn--bcher-kva{CHAT}", True),
        ([GATEWAY, "http://two"], "POST", f"http://two{CHAT}", True),
        ([GATEWAY, "http://two/base"], "POST", f"http://two{CHAT}", False),
    ],
)
def test_tagged_is_a_post_to_the_path_below_the_gateways_base_path(
    gateway: str | list[str], method: str, url: str, tagged: bool
) -> None:
    assert RoutingConfig(gateway).tags(method, URL(url)) is tagged


def test_a_call_is_tagged_as_aiohttp_sends_it() -> None:
    """Before 3.14 a hook is shown the method, and always an encoded URL, as it was passed."""
    config = RoutingConfig("http://gateway")
    assert config.tags("post", URL(f"http://gateway{CHAT}"))
    assert config.tags("POST", URL(f"http://GATEWAY{CHAT}", encoded=True))
    assert not config.tags("POST", URL(CHAT))


def test_config_error_comes_whole_out_of_another_process() -> None:
    with pytest.raises(ConfigError) as caught:
        RoutingConfig("localhost")
    copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert copy.faults == caught.value.faults
    assert str(copy) == str(caught.value)


@pytest.mark.parametrize("authority", ["gateway:x", ":::80", "gateway:99999999"])
def test_a_url_that_cannot_be_read_is_not_tagged(authority: str) -> None:
    url = URL(f"http://{authority}{CHAT}", encoded=True)
    assert not RoutingConfig("http://gateway").tags("POST", url)


def test_paths_replace_the_default() -> None:
    config = RoutingConfig(GATEWAY, paths=["/generate", "/v1/completions"])
    assert config.tags("POST", URL(f"{GATEWAY}/generate"))
    assert config.tags("POST", URL(f"{GATEWAY}/v1/completions"))
    assert not config.tags("POST", URL(GATEWAY + CHAT))


def test_routing_key_follows_key_and_secret() -> None:
    assert RoutingConfig(GATEWAY).routing_key("s-1") == "s-1"
    assert RoutingConfig(GATEWAY, key="digest").routing_key("s-1").startswith("sha256-")
    keyed = RoutingConfig(GATEWAY, key="digest", secret="k").routing_key("s-1")
    assert keyed.startswith("hmac-sha256-")
    assert RoutingConfig(GATEWAY, prefix="job-7/").routing_key("s-1") == "job-7/s-1"


def test_mapping_takes_plain_strings() -> None:
    assert RoutingConfig.from_mapping(
        {
            "gateway": "http://one:1, http://two:2/base",
            "enabled": "No",
            "session_id": "header:X-Session-Id, cookie:sid",
            "paths": "/generate,/v1/completions",
            "header": "X-Key",
            "key": "digest",
            "secret": "a,b",
            "prefix": "a,b/",
            "ignore_ids": "default, 0",
            "on_missing": "raise",
            "client_session": "one,two",
        }
    ) == RoutingConfig(
        ["http://one:1", "http://two:2/base"],
        enabled=False,
        session_id=["header:X-Session-Id", "cookie:sid"],
        paths=["/generate", "/v1/completions"],
        header="X-Key",
        key="digest",
        secret="a,b",
        prefix="a,b/",
        ignore_ids=["default", "0"],
        on_missing="raise",
        client_session=["one", "two"],
    )


@pytest.mark.parametrize(
    ("text", "enabled"), [("true", True), ("ON", True), ("1", True), ("off", False), (" 0", False)]
)
def test_truth_values_as_text(text: str, enabled: bool) -> None:
    assert RoutingConfig.from_mapping({"gateway": GATEWAY, "enabled": text}).enabled is enabled


def test_mapping_takes_native_values_and_leaves_lists_whole() -> None:
    def source(request: web.Request) -> str:
        return "s"

    key = web.AppKey("key", object)
    config = RoutingConfig.from_mapping(
        {
            "gateway": ["http://one/a,b"],
            "enabled": False,
            "session_id": source,
            "client_session": [key, "name"],
        }
    )
    assert config.gateway == (URL("http://one/a,b"),)
    assert config.session_id == (source,)
    assert config.client_session == (key, "name")


def test_environment() -> None:
    environ = {
        "SMG_ROUTING_GATEWAY": GATEWAY,
        "SMG_ROUTING_KEY": "digest",
        "SMG_ROUTING_SECRET": "s",
        "SMG_ROUTING_ENABLED": "",
        "OTHER": "x",
    }
    expected = RoutingConfig(GATEWAY, key="digest", secret="s")
    assert RoutingConfig.from_env(environ=environ) == expected
    assert RoutingConfig.from_env("A_", {"A_GATEWAY": GATEWAY}) == RoutingConfig(GATEWAY)


def test_environment_is_read_when_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMG_ROUTING_GATEWAY", GATEWAY)
    assert RoutingConfig.from_env() == RoutingConfig(GATEWAY)


def test_environment_faults_name_the_variable() -> None:
    with pytest.raises(ConfigError) as caught:
        RoutingConfig.from_env(environ={"SMG_ROUTING_GATEWAYS": GATEWAY, "SMG_ROUTING_KEY": "x"})
    assert caught.value.faults == (
        ("SMG_ROUTING_GATEWAYS", "unknown key; the nearest one is 'SMG_ROUTING_GATEWAY'"),
        (
            "SMG_ROUTING_GATEWAY",
            "is required: the URL of the gateway, such as 'http://10.0.0.1:30000'",
        ),
        ("SMG_ROUTING_KEY", "is not one of 'session_id', 'digest'"),
    )


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("gateway", "localhost:30000", "'localhost:30000' is not an absolute http(s) URL"),
        ("gateway", "/v1", "'/v1' is not an absolute http(s) URL"),
        ("gateway", "ftp://host", "'ftp://host' is not an absolute http(s) URL"),
        ("gateway", "http://", "'http://' is not an absolute http(s) URL"),
        ("gateway", "http://h:99999", "'http://h:99999' is not an absolute http(s) URL"),
        ("gateway", 30000, "30000 is not an absolute http(s) URL such as 'http://10.0.0.1:30000'"),
        ("gateway", "http://h/?a=b", "is not an absolute http(s) URL such as 'http://10.0.0.1:"),
        ("gateway", "http://h/#a", ", without query and fragment"),
        ("gateway", ["http://h", "http://u:p@h/?x=1"], "number 2 of 2 is not an absolute http(s)"),
        ("gateway", [{}], "a dict is not an absolute http(s) URL"),
        ("gateway", [], "is required: the URL of the gateway, such as 'http://10.0.0.1:30000'"),
        ("enabled", "perhaps", "'perhaps' is not true or false"),
        ("enabled", 1, "1 is not true or false"),
        ("session_id", "", "is empty: name at least one"),
        ("session_id", "call:nowhere", "'call:nowhere' does not have the form"),
        ("session_id", "call:no.such:f", "'call:no.such:f' cannot be imported: ModuleNotFound"),
        ("session_id", "call:os:nope", "'call:os:nope' cannot be imported: AttributeError"),
        ("session_id", "call:os:sep", "'call:os:sep' names a str, which cannot be called"),
        ("session_id", "headers:X", "'headers:X' is not a source: one is 'match_info:NAME', "),
        ("session_id", "header:", "'header:' is not a source"),
        ("session_id", "header:X Y", "'header:X Y' does not name a header"),
        ("session_id", 5, "5 is not a source"),
        ("session_id", "json:", "'json:' is not a source: one is "),
        ("session_id", "json:a..b", "'json:a..b' has an empty name in its path: one is 'json:"),
        ("ignore_ids", ["a", " "], "' ' is not a session id: a text that is not blank, or"),
        ("paths", {"a": "b"}, "a dict is not a path such as"),
        ("ignore_ids", [None], "None is not a session id"),
        ("ignore_ids", [True], "True is not a session id"),
        ("prefix", "a b", "'a b' is not a text of up to 52 visible ASCII characters"),
        ("paths", "v1/chat", "'v1/chat' is not a path such as '/v1/chat/completions'"),
        ("paths", "//evil/x", "'//evil/x' is not a path"),
        ("paths", "/a?b", "'/a?b' is not a path"),
        ("paths", "/a/..", "'/a/..' is not a path"),
        ("gateway", "http://[]@", "is not an absolute http(s) URL"),
        ("paths", ["/a", 5], "5 is not a path"),
        ("header", "X Key", "'X Key' is not a header name such as 'X-SMG-Routing-Key'"),
        ("header", "X-Key\r\n", "is not a header name"),
        ("header", "Content-Length", "'Content-Length' is not a header name such as"),
        ("header", "host", "'host' is not a header name such as"),
        ("key", "hash", "is not one of 'session_id', 'digest'"),
        ("secret", "s", "is used with key = 'digest' only, and key is 'session_id'"),
        ("on_missing", "ignore", "'ignore' is not one of 'pass', 'warn', 'raise'"),
        ("client_session", [5], "5 is not an app key: a text or a web.AppKey"),
        ("sesion_id", "x", "unknown key; the nearest one is 'session_id'"),
        (5, "x", "unknown key; the nearest one is "),
    ],
)
def test_a_fault_names_the_key_what_it_got_and_what_it_takes(
    key: Any, value: Any, problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        RoutingConfig.from_mapping({"gateway": GATEWAY, key: value})
    [(name, text)] = caught.value.faults
    assert name == str(key)
    assert problem in text
    assert f"{name}: {text}" == str(caught.value)


@pytest.mark.parametrize("secret", [12345, "", ["hush"]])
def test_a_fault_never_shows_the_secret(secret: Any) -> None:
    [(name, text)] = faults(key="digest", secret=secret).items()
    assert (name, text) == ("secret", "is not a text of one character or more")


def test_repr_never_shows_the_secret_or_credentials() -> None:
    config = RoutingConfig("http://user:pw@gateway", key="digest", secret="hush")
    assert "hush" not in repr(config)
    assert "pw" not in repr(config)


def test_all_faults_are_named_at_once() -> None:
    given = {"gateway": "localhost:1,h", "keys": "x", "header": "", "secret": "s", "enabled": "?"}
    with pytest.raises(ConfigError) as caught:
        RoutingConfig.from_mapping(given)
    assert [name for name, _ in caught.value.faults] == [
        "keys",
        "gateway",
        "gateway",
        "enabled",
        "header",
        "secret",
    ]
    assert "\ngateway: 'h' is not an absolute http(s) URL such as" in str(caught.value)


def test_a_config_of_another_type_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="config: is a NoneType, not a RoutingConfig or a m"):
        as_config(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
        ("raise SystemExit(0)", "cannot be imported: SystemExit(0)"),  # a script, not a module
    ],
)
def test_an_import_that_explodes_is_a_fault_of_the_config(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, code: str, problem: str
) -> None:
    (tmp_path / "exploding_source.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert problem in faults(session_id="call:exploding_source:find")["session_id"]


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("track_sessions", -1, "-1 is not a whole number of 0 or more"),
        ("track_sessions", "many", "'many' is not a whole number of 0 or more"),
        ("track_sessions", "1_0", "'1_0' is not a whole number of 0 or more"),
        ("track_sessions", True, "True is not a whole number of 0 or more"),
        ("on_move", 5, "5 is not a function or 'call:package.module:function'"),
        ("on_move", "os:sep", "'os:sep' is not a function or 'call:package.module:function'"),
        ("on_move", "call:os:sep", "'call:os:sep' names a str, which cannot be called"),
        ("on_move", asyncio.sleep, "is async: nobody would await it"),
        ("metrics_registry", object, "is not a prometheus_client.CollectorRegistry"),
        ("metrics", "statsd", "'statsd' is not one of 'prometheus'"),
        ("metrics_registry", "os:sep", "'os:sep' is not a prometheus_client.CollectorRegistry"),
        ("hide_worker_ids", "maybe", "'maybe' is not true or false"),
    ],
)
def test_faults_of_the_ledgers_keys(key: str, value: Any, problem: str) -> None:
    [(name, text)] = faults(**{key: value}).items()
    assert name == key
    assert problem in text


def test_metrics_need_the_ledger() -> None:
    problem = "come from the ledger, and track_sessions = 0 switches it off"
    assert faults(metrics="prometheus", track_sessions=0) == {"metrics": problem}


def test_the_ledgers_keys_take_plain_strings() -> None:
    config = RoutingConfig.from_mapping(
        {"gateway": GATEWAY, "track_sessions": "5000", "hide_worker_ids": "yes", "on_move": None}
    )
    assert (config.track_sessions, config.hide_worker_ids) == (5000, True)
