import copy
import logging
import pickle
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import FrozenInstanceError, fields, replace
from functools import partial
from typing import Any

import pytest
from aiohttp import web
from yarl import URL

from aiohttp_smg_routing import ConfigError, Routing, RoutingConfig, setup
from aiohttp_smg_routing.rules import Rules
from harness.agents import CHAT_PATH

from ..fresh import python

GATEWAY = "http://10.0.0.1:30000"
ABSOLUTE = "is not an absolute http(s) URL"


def faults(**values: Any) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        RoutingConfig.from_mapping({"gateway": GATEWAY, **values})
    return dict(caught.value.faults)


def is_tagged(config: RoutingConfig, method: str, url: URL) -> bool:
    return Rules(config, Routing(config).pins).gateway_of(method, url) is not None


def values_of(config: RoutingConfig) -> dict[str, Any]:
    return {it.name: getattr(config, it.name) for it in fields(config)}


def find_session(request: web.Request) -> str:
    return "s-1"


def alarm(move: object) -> None:
    pass


class Registry:
    """The least that a config requires of a metrics registry."""

    def register(self, collector: object) -> None:
        pass


CLIENT = web.AppKey("client", object)
REGISTRY = Registry()
#: Each option: the value that code passes, and the value that the config holds.
EVERY: dict[str, tuple[Any, Any]] = {
    "gateway": ("http://One:80/, http://two/b", (URL("http://one"), URL("http://two/b"))),
    "enabled": ("no", False),
    "session_id": (["header:X", find_session], ("header:X", find_session)),
    "ignore_ids": (["default", 0, "a,b"], ("default", "0", "a,b")),
    "pin_by": (
        "{session_id}/{json:model}",
        ("{session_id}/{json:model}", ("session_id", "json:model")),
    ),
    "paths": ("/generate,/v1/a b", ("/generate", "/v1/a%20b")),
    "header": ("X-Key", "X-Key"),
    "worker_header": ("X-Worker", "X-Worker"),
    "key": ("digest", "digest"),
    "secret": ("a,b", "a,b"),
    "prefix": ("a,b/", "a,b/"),
    "on_missing": ("raise", "raise"),
    "on_late": ("pass", "pass"),
    "client_session": ([CLIENT, "name"], (CLIENT, "name")),
    "instrument": ("ON", True),
    "json_max_size": ("1000", 1000),
    "track_sessions": (" 5000 ", 5000),
    "on_move": (alarm, alarm),
    "metrics": ("prometheus", "prometheus"),
    "metrics_registry": (REGISTRY, REGISTRY),
    "hide_worker_ids": ("1", True),
}


def test_defaults() -> None:
    config = RoutingConfig(GATEWAY)
    assert config.enabled is True
    assert config.session_id == ("match_info:session_id",)
    assert config.ignore_ids == ()
    assert config.pin_by.template == "{session_id}"
    assert config.paths == (CHAT_PATH,)
    assert config.header == "X-SMG-Routing-Key"
    assert config.worker_header == "X-SMG-Routed-Worker-Id"
    assert config.key == "session_id"
    assert config.secret is None
    assert config.prefix == ""
    assert config.on_missing == "pass"
    assert config.on_late == "warn"
    assert config.client_session == ()
    assert config.instrument is False
    assert config.json_max_size == 16 * 2**20
    assert config.track_sessions == 100_000
    assert config.on_move is None
    assert config.metrics is None
    assert config.metrics_registry is None
    assert config.hide_worker_ids is False


def test_every_option_has_its_own_type_however_it_is_given() -> None:
    assert {it.name for it in fields(RoutingConfig)} == EVERY.keys()
    config = RoutingConfig.from_mapping({name: given for name, (given, _) in EVERY.items()})
    for name, (_, kept) in EVERY.items():
        value = getattr(config, name)
        assert value == kept
        assert isinstance(value, type(kept))
        if isinstance(kept, tuple):
            assert [*map(type, value)] == [*map(type, kept)]
    assert all(url.user is None and isinstance(url, URL) for url in config.gateway)


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


def test_a_list_that_is_changed_later_does_not_change_the_config() -> None:
    gateways, ids = [GATEWAY], ["default"]
    config = RoutingConfig(gateways, ignore_ids=ids)
    gateways.append("http://evil")
    ids.clear()
    assert config == RoutingConfig(GATEWAY, ignore_ids="default")


@pytest.mark.parametrize(
    "again",
    [
        replace,
        copy.copy,
        lambda config: RoutingConfig(
            **{it.name: getattr(config, it.name) for it in fields(config)}
        ),
        lambda config: replace(replace(config, prefix="x"), prefix=config.prefix),
    ],
)
def test_a_config_is_made_again_of_its_own_values(again: Callable[[RoutingConfig], object]) -> None:
    """Parsed values are not parsed again: a comma within one doesn't split it."""
    config = RoutingConfig.from_mapping(
        {name: given for name, (given, _) in EVERY.items()} | {"gateway": ["http://one/a,b"]}
    )
    made = again(config)
    assert made == config
    assert hash(made) == hash(config)
    assert isinstance(made, RoutingConfig)
    assert made.gateway == (URL("http://one/a,b"),)
    assert made.ignore_ids == ("default", "0", "a,b")


def test_replace_checks_what_it_makes() -> None:
    config = RoutingConfig(GATEWAY, key="digest", secret="s")
    with pytest.raises(ConfigError, match="secret: needs key"):
        replace(config, key="session_id")
    with pytest.raises(ConfigError, match="gateway: 'localhost'"):
        replace(config, gateway="localhost")  # type: ignore[arg-type]


def test_what_is_set_up_is_the_config_that_was_given() -> None:
    config = RoutingConfig(GATEWAY)
    assert Routing(config).config is config
    assert setup(web.Application(), config).config is config


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_config_survives_a_trip_to_another_process(protocol: int) -> None:
    given = {name: given for name, (given, _) in EVERY.items()}
    config = RoutingConfig.from_mapping(
        {**given, "enabled": True, "client_session": "client", "metrics_registry": None}
    )
    for copied in (pickle.loads(pickle.dumps(config, protocol)), copy.deepcopy(config)):  # noqa: S301
        assert copied == config
        assert hash(copied) == hash(config)
        assert is_tagged(copied, "POST", URL("http://one/generate"))


@pytest.mark.parametrize(
    ("gateway", "method", "url", "tagged"),
    [
        (GATEWAY, "POST", GATEWAY + CHAT_PATH, True),
        (GATEWAY, "POST", f"http://user:pw@10.0.0.1:30000{CHAT_PATH}?a=b#c", True),
        (GATEWAY, "GET", GATEWAY + CHAT_PATH, False),
        (GATEWAY, "PUT", GATEWAY + CHAT_PATH, False),
        (GATEWAY, "POST", f"https://10.0.0.1:30000{CHAT_PATH}", False),
        (GATEWAY, "POST", f"ws://10.0.0.1:30000{CHAT_PATH}", False),
        (GATEWAY, "POST", f"http://10.0.0.1:30001{CHAT_PATH}", False),
        (GATEWAY, "POST", f"http://10.0.0.1{CHAT_PATH}", False),
        (GATEWAY, "POST", f"http://10.0.0.1:30000@evil{CHAT_PATH}", False),
        (GATEWAY, "POST", f"http://10.0.0.1.evil:30000{CHAT_PATH}", False),
        (GATEWAY, "POST", f"{GATEWAY}{CHAT_PATH}/", False),
        (GATEWAY, "POST", f"{GATEWAY}/{CHAT_PATH}", False),
        (GATEWAY, "POST", f"{GATEWAY}{CHAT_PATH}x", False),
        (GATEWAY, "POST", f"{GATEWAY}{CHAT_PATH.upper()}", False),
        (GATEWAY, "POST", f"{GATEWAY}/v1/models", False),
        (GATEWAY, "POST", f"{GATEWAY}/v1/chat%2Fcompletions", False),
        (GATEWAY, "POST", f"{GATEWAY}/v1/../v1/chat/completions", True),
        (GATEWAY, "POST", f"{GATEWAY}/base{CHAT_PATH}", False),
        (GATEWAY + "/base", "POST", f"{GATEWAY}/base{CHAT_PATH}", True),
        (GATEWAY + "/base/", "POST", f"{GATEWAY}/base{CHAT_PATH}", True),
        (GATEWAY + "/base", "POST", GATEWAY + CHAT_PATH, False),
        (GATEWAY + "/a%20b", "POST", f"{GATEWAY}/a b{CHAT_PATH}", True),
        ("http://gateway", "POST", f"http://GATEWAY:80{CHAT_PATH}", True),
        ("https://gateway:443", "POST", f"https://gateway{CHAT_PATH}", True),
        ("http://user:pw@gateway", "POST", f"http://gateway{CHAT_PATH}", True),
        ("http://[::1]:30000", "POST", f"http://[::1]:30000{CHAT_PATH}", True),
        ("http://bücher", "POST", f"http://xn--bcher-kva{CHAT_PATH}", True),
        ([GATEWAY, "http://two"], "POST", f"http://two{CHAT_PATH}", True),
        ([GATEWAY, "http://two/base"], "POST", f"http://two{CHAT_PATH}", False),
    ],
)
def test_tagged_is_a_post_to_the_path_below_the_gateways_base_path(
    gateway: str | list[str], method: str, url: str, tagged: bool
) -> None:
    assert is_tagged(RoutingConfig(gateway), method, URL(url)) is tagged


def test_a_call_is_tagged_as_aiohttp_sends_it() -> None:
    """The hook gets an encoded URL as passed, and before aiohttp 3.14 the method as well."""
    config = RoutingConfig("http://gateway")
    assert is_tagged(config, "post", URL(f"http://gateway{CHAT_PATH}"))
    assert is_tagged(config, "POST", URL(f"http://GATEWAY{CHAT_PATH}", encoded=True))
    assert not is_tagged(config, "POST", URL(CHAT_PATH))


@pytest.mark.parametrize("authority", ["gateway:x", ":::80", "gateway:99999999"])
def test_a_url_that_cannot_be_read_is_not_tagged(authority: str) -> None:
    url = URL(f"http://{authority}{CHAT_PATH}", encoded=True)
    assert not is_tagged(RoutingConfig("http://gateway"), "POST", url)


def test_paths_replace_the_default() -> None:
    config = RoutingConfig(GATEWAY, paths=["/generate", "/v1/completions"])
    assert is_tagged(config, "POST", URL(f"{GATEWAY}/generate"))
    assert is_tagged(config, "POST", URL(f"{GATEWAY}/v1/completions"))
    assert not is_tagged(config, "POST", URL(GATEWAY + CHAT_PATH))


@pytest.mark.parametrize(
    ("gateway", "paths", "right"),
    [
        ("http://h:30000/v1", CHAT_PATH, "http://h:30000"),
        ("http://h:30000/v1/", CHAT_PATH, "http://h:30000"),
        ("http://h:30000//v1//", CHAT_PATH, "http://h:30000/"),
        ("http://h:30000/v1/chat", CHAT_PATH, "http://h:30000"),
        (f"http://h:30000{CHAT_PATH}", CHAT_PATH, "http://h:30000"),
        (f"http://h:30000{CHAT_PATH}/", CHAT_PATH, "http://h:30000"),
        ("http://h/%76%31", CHAT_PATH, "http://h"),
        ("http://h/v1/.", CHAT_PATH, "http://h"),
        ("http://h/v1/v1", CHAT_PATH, "http://h/v1"),
        ("https://[::1]:8/api/v1", CHAT_PATH, "https://[::1]:8/api"),
        ("http://u:pw@h/v1", CHAT_PATH, "http://h"),
        (f"http://h{CHAT_PATH}", "/chat/completions", "http://h/v1"),
        ("http://h/generate", "/generate", "http://h"),
        ("http://h/a%20b", "/a b/c", "http://h"),
        (["http://one", "http://two/v1"], CHAT_PATH, "http://two"),
        ("http://h/v1", ["/chat/completions", "/v1/embeddings"], "http://h"),
    ],
)
def test_a_gateway_that_ends_in_what_the_paths_begin_with_is_a_fault_with_the_url_to_write(
    gateway: Any, paths: Any, right: str
) -> None:
    problem = faults(gateway=gateway, paths=paths)["gateway"]
    assert problem.endswith(f": write {right!r}")
    assert "pw" not in problem


@pytest.mark.parametrize(
    ("gateway", "paths"),
    [
        ("http://h/v1", "/chat/completions"),
        ("http://h/v1/", "/chat/completions"),
        ("http://h/apiv1", CHAT_PATH),
        ("http://h/v12", CHAT_PATH),
        ("http://h/v1/models", CHAT_PATH),
        ("http://v1", CHAT_PATH),
        ("http://h/openai", "/v1/chat/completions"),
    ],
)
def test_gateway_and_path_are_judged_together(gateway: str, paths: str) -> None:
    config = RoutingConfig(gateway, paths=paths)
    assert is_tagged(config, "POST", URL(f"{gateway.rstrip('/')}{paths}"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gateway", "http://10.0.0.*:30000"),
        ("gateway", "http://*"),
        ("gateway", "http://h:*"),
        ("gateway", "http://h/*"),
        ("gateway", ["http://h", "http://*.example"]),
        ("gateway", "http://${GATEWAY_HOST}:30000"),  # a placeholder
        ("gateway", "http://{{ host }}:30000"),
        ("gateway", URL("http://*")),
        ("paths", "/v1/*"),
        ("paths", "*"),
        ("paths", "/{path:.*}"),
        ("paths", [CHAT_PATH, "/v1/{name}"]),
    ],
)
def test_a_wildcard_is_a_fault(name: str, value: Any) -> None:
    assert f"has a wildcard: name each {name.removesuffix('s')}" in faults(**{name: value})[name]


def test_a_password_may_look_like_a_wildcard() -> None:
    assert RoutingConfig("http://user:p*{w}@h") == RoutingConfig("http://h")


@pytest.mark.parametrize("value", ["all", "All", "ALL", " all ", ["all"], ["client", "aLL"]])
def test_every_client_session_is_an_option_of_its_own_and_no_app_key(value: Any) -> None:
    problem = faults(client_session=value)["client_session"]
    assert problem.endswith("is not an app key: for every ClientSession write instrument = true")


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("session_id", "call:package.module:function", "session_id=[function]"),
        ("session_id", "aiohttp_session:sid", "aiohttp_session.get_session(request)"),
        ("session_id", ["header:X", "aiohttp_session:sid"], "a function that awaits"),
        ("pin_by", "{call:package.module:function}", "is gone"),
        ("on_move", "call:package.module:function", "pass it in code"),
        ("metrics_registry", "prometheus_client:REGISTRY", "pass it in code"),
        ("client_session", "all", "instrument = true"),
    ],
)
def test_an_option_that_is_gone_says_what_to_write_instead(
    name: str, value: Any, instead: str
) -> None:
    assert instead in faults(**{name: value})[name]


def test_config_imports_no_code(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "exploding_module.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("session_id", "on_move", "metrics_registry", "client_session", "pin_by"):
        for text in ("call:exploding_module:x", "exploding_module:x", "{call:exploding_module:x}"):
            with suppress(ConfigError):
                RoutingConfig(GATEWAY, **{name: text})
    assert "exploding_module" not in sys.modules


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
            "json_max_size": "1000",
            "track_sessions": "5000",
            "hide_worker_ids": "yes",
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
        json_max_size=1000,
        track_sessions=5000,
        hide_worker_ids=True,
    )


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("ON", True), ("1", True), ("off", False), (" 0", False)]
)
@pytest.mark.parametrize("name", ["enabled", "instrument", "hide_worker_ids"])
def test_truth_values_as_text(name: str, text: str, value: bool) -> None:
    config = RoutingConfig.from_mapping({"gateway": GATEWAY, name: text})
    assert getattr(config, name) is value


def test_mapping_takes_native_values_and_leaves_lists_whole() -> None:
    config = RoutingConfig.from_mapping(
        {
            "gateway": ["http://one/a,b"],
            "enabled": False,
            "session_id": find_session,
            "client_session": [CLIENT, "name"],
        }
    )
    assert config.gateway == (URL("http://one/a,b"),)
    assert config.session_id == (find_session,)
    assert config.client_session == (CLIENT, "name")


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
    assert RoutingConfig.from_env(environ=None) == RoutingConfig(GATEWAY)
    with pytest.raises(ConfigError, match="SMG_ROUTING_GATEWAY: is required"):
        RoutingConfig.from_env(environ={})  # an empty mapping is not None


def test_help_shows_nothing_of_the_environment() -> None:
    code = (
        "import pydoc, aiohttp_smg_routing as r; print(pydoc.render_doc(r));"
        "names = [name for name in r.__all__ if not isinstance(vars(r)[name], str)];"
        "print(*(pydoc.render_doc(vars(r)[name]) for name in names))"
    )
    shown = python(code, env={"SMG_ROUTING_SECRET": "hush-1", "A_TOKEN": "hush-2"})
    assert "from_env" in shown
    assert "hush" not in shown


def test_environment_faults_name_the_variable() -> None:
    with pytest.raises(ConfigError) as caught:
        RoutingConfig.from_env(environ={"SMG_ROUTING_GATEWAYS": GATEWAY, "SMG_ROUTING_KEY": "x"})
    found = dict(caught.value.faults)
    nearest = found.pop("SMG_ROUTING_GATEWAYS").lower()
    assert re.fullmatch("unknown option; the nearest one is '.*gateway'", nearest)
    assert found == {
        "SMG_ROUTING_GATEWAY": "is required: the URL of the gateway, such as "
        "'http://10.0.0.1:30000'",
        "SMG_ROUTING_KEY": "is not one of 'session_id', 'digest'",
    }


#: Kubernetes sets these variables in each container for a service named smg-routing.
KUBERNETES = {
    "SMG_ROUTING_SERVICE_HOST": "10.96.7.1",
    "SMG_ROUTING_SERVICE_PORT": "30000",
    "SMG_ROUTING_SERVICE_PORT_HTTP": "30000",
    "SMG_ROUTING_SERVICE_PORT_METRICS": "29000",
    "SMG_ROUTING_PORT": "tcp://10.96.7.1:30000",
    "SMG_ROUTING_PORT_30000_TCP": "tcp://10.96.7.1:30000",
    "SMG_ROUTING_PORT_30000_TCP_PROTO": "tcp",
    "SMG_ROUTING_PORT_30000_TCP_PORT": "30000",
    "SMG_ROUTING_PORT_30000_TCP_ADDR": "10.96.7.1",
}


@pytest.mark.parametrize(
    "foreign", [KUBERNETES, {"SMG_ROUTING_COLOUR": "hush"}, {"SMG_ROUTING_": "hush"}]
)
def test_a_foreign_variable_is_ignored_with_a_line_that_names_it(
    foreign: Mapping[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    environ = {"SMG_ROUTING_GATEWAY": GATEWAY, "SMG_ROUTING_KEY": "digest", **foreign}
    assert RoutingConfig.from_env(environ=environ) == RoutingConfig(GATEWAY, key="digest")
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert all(name in record.getMessage() for name in foreign)
    assert not any(text in record.getMessage() for text in foreign.values() if len(text) > 5)


@pytest.mark.parametrize("name", ["SECERT", "GATWAY", "SESSION", "ON_MISING", "CLIENT_SESSIONS"])
def test_a_variable_that_is_nearly_an_option_is_a_fault(name: str) -> None:
    with pytest.raises(ConfigError, match=f"SMG_ROUTING_{name}: unknown option; the nearest"):
        RoutingConfig.from_env(environ={"SMG_ROUTING_GATEWAY": GATEWAY, f"SMG_ROUTING_{name}": "x"})


@pytest.mark.parametrize("others", [{}, {"key": "digest"}, {"pin_by": "{header:X}"}])
def test_an_empty_secret_is_a_fault(others: dict[str, str]) -> None:
    """A template may leave the variable empty; anybody could then guess the keys."""
    assert faults(secret="", **others) == {"secret": "is not a string of one character or more"}
    environ = {f"SMG_ROUTING_{name.upper()}": text for name, text in others.items()}
    with pytest.raises(ConfigError, match="SMG_ROUTING_SECRET: is not a string of one character"):
        RoutingConfig.from_env(
            environ={"SMG_ROUTING_GATEWAY": GATEWAY, "SMG_ROUTING_SECRET": "", **environ}
        )


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("sesion_id", "session_id"),
        ("Gateway", "gateway"),
        ("gateways", "gateway"),
        ("client_sessions", "client_session"),
        ("hide_worker_id", "hide_worker_ids"),
        ("pinby", "pin_by"),
        ("on_moved", "on_move"),
    ],
)
def test_an_unknown_option_suggests_the_one_that_is_near(name: str, near: str) -> None:
    assert faults(**{name: "x"}) == {name: f"unknown option; the nearest one is {near!r}"}


@pytest.mark.parametrize("name", ["colour", "timeout", "port", "url", "host", "x", "", "workers"])
def test_an_unknown_option_suggests_nothing_that_is_far(name: str) -> None:
    assert faults(**{name: "x"}) == {name: "unknown option"}


@pytest.mark.parametrize(
    ("file", "table"),
    [
        ({"smg_routing": {"gateway": GATEWAY}}, "config['smg_routing']"),
        ({"port": 8080, "log": {}, "routing": {"gateway": GATEWAY}}, "config['routing']"),
        ({"tool": {"a": {"x": 1}, "b": {"gateway": GATEWAY}}}, "config['tool']['b']"),
    ],
)
def test_the_whole_file_in_place_of_its_table_says_which_table_to_pass(
    file: dict[str, Any], table: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        setup(web.Application(), file)
    assert caught.value.faults == (("config", f"is the whole file: pass its table, {table}"),)
    found = file
    for name in table.removeprefix("config['").removesuffix("']").split("']['"):
        found = found[name]
    assert RoutingConfig.from_mapping(found) == RoutingConfig(GATEWAY)


@pytest.mark.parametrize(
    "mapping",
    [
        {"gateway": GATEWAY, "other": {"gateway": "hush"}},  # the table's name has a typo
        {"deep": {"er": {"and": {"deep": {"er": {"gateway": "hush"}}}}}},
        {"list": [{"gateway": "hush"}]},
    ],
)
def test_what_is_not_the_whole_file_has_faults_of_its_own(mapping: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        RoutingConfig.from_mapping(mapping)
    assert "whole file" not in str(caught.value)
    assert "hush" not in str(caught.value)


def test_a_mapping_that_holds_itself_has_faults_of_its_own() -> None:
    mapping: dict[str, Any] = {}
    mapping["more"] = mapping
    with pytest.raises(ConfigError, match="more: unknown option"):
        RoutingConfig.from_mapping(mapping)


@pytest.mark.parametrize("config", [{"gateway": GATEWAY}, RoutingConfig(GATEWAY)])
def test_swapped_arguments_of_setup_say_which_comes_first(config: Any) -> None:
    with pytest.raises(TypeError, match=r"setup\(app, config\) takes the app first"):
        setup(config, web.Application())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("gateway", "localhost:30000", f"'localhost:30000' {ABSOLUTE}"),
        ("gateway", "/v1", f"'/v1' {ABSOLUTE}"),
        ("gateway", "ftp://host", f"'ftp://host' {ABSOLUTE}"),
        ("gateway", "http://", f"'http://' {ABSOLUTE}"),
        ("gateway", "http://h:99999", f"'http://h:99999' {ABSOLUTE}"),
        ("gateway", 30000, f"30000 {ABSOLUTE} such as 'http://10.0.0.1:30000'"),
        ("gateway", b"http://h", f"a bytes {ABSOLUTE}"),
        ("gateway", "http://h/?a=b", f"{ABSOLUTE} such as 'http://10.0.0.1:"),
        ("gateway", "http://h/#a", ", without query and fragment"),
        ("gateway", ["http://h", "http://u:p@h/?x=1"], "number 2 of 2 is not an absolute http(s)"),
        ("gateway", [{}], f"a dict {ABSOLUTE}"),
        ("gateway", [], "is required: the URL of the gateway, such as 'http://10.0.0.1:30000'"),
        ("gateway", "http://[]@", ABSOLUTE),
        ("gateway", "http://http://h:1", f"'http://http://h:1' {ABSOLUTE}"),
        ("enabled", "perhaps", "'perhaps' is not true or false"),
        ("enabled", 1, "1 is not true or false"),
        ("session_id", "", "is empty: name at least one"),
        ("session_id", "headers:X", "'headers:X' is not a source: use 'match_info:NAME', "),
        ("session_id", "header:", "'header:' is not a source"),
        ("session_id", "header:X Y", "'header:X Y' does not name a header"),
        ("session_id", 5, "5 is not a source"),
        ("session_id", "json:", "'json:' is not a source: use "),
        ("session_id", "json:a..b", "'json:a..b' has an empty name in its path: use 'json:"),
        ("session_id", "{session_id}", "'{session_id}' is not a source"),
        ("session_id", "query: sid", "'query: sid' is not a source: use 'match_info:NAME', "),
        ("session_id", "match_info:{id}", "has braces: write the name of the route's variable wi"),
        ("pin_by", "{match_info: id}", "has {match_info: id} in it, which is not a source"),
        ("ignore_ids", ["a", " "], "' ' is not a session id: a string that is not blank, or"),
        ("ignore_ids", [None], "None is not a session id"),
        ("ignore_ids", [True], "True is not a session id"),
        ("pin_by", "", "'' has no source in braces, such as '{session_id}/{json:model}'"),
        ("pin_by", "json:model", "'json:model' has no source in braces"),
        ("pin_by", "{session_id", "'{session_id' has no source in braces"),
        ("pin_by", "{{session_id}}", "'{{session_id}}' has no source in braces"),
        ("pin_by", "{}", "'{}' has {} in it, which is not a source"),
        ("pin_by", "{session_id}/{model}", "has {model} in it, which is not a source: use"),
        ("pin_by", "{header:a b}", "has {header:a b} in it, which does not name a header"),
        ("pin_by", "{json:a..b}", "has {json:a..b} in it, which has an empty name in its path"),
        ("pin_by", 5, "5 is not a string such as '{session_id}/{json:model}'"),
        ("pin_by", ["{session_id}"], "a list is not a string such as"),
        ("pin_by", None, "None is not a string such as"),
        ("paths", [], "is empty: name at least one path"),
        ("paths", {"a": "b"}, "a dict is not a path such as"),
        ("paths", "v1/chat", "'v1/chat' is not a path such as '/v1/chat/completions'"),
        ("paths", "//evil/x", "'//evil/x' is not a path"),
        ("paths", "/a?b", "'/a?b' is not a path"),
        ("paths", "/a/..", "'/a/..' is not a path"),
        ("paths", ["/a", 5], "5 is not a path"),
        ("prefix", "a b", "'a b' is not a string of up to 52 visible ASCII characters"),
        ("header", "X Key", "'X Key' is not a header name such as 'X-SMG-Routing-Key'"),
        ("header", "X-Key\r\n", "is not a header name"),
        ("worker_header", "X Worker", "'X Worker' is not a header name"),
        ("header", "Content-Length", "'Content-Length' is not a header name such as"),
        ("header", "host", "'host' is not a header name such as"),
        ("key", "hash", "is not one of 'session_id', 'digest'"),
        ("secret", "s", "needs key = 'digest' or pin_by, and there is neither"),
        ("on_missing", "ignore", "'ignore' is not one of 'pass', 'warn', 'raise'"),
        ("on_late", True, "True is not one of 'pass', 'warn', 'raise'"),
        ("client_session", [5], "5 is not an app key: a string or a web.AppKey"),
        ("instrument", "some", "'some' is not true or false"),
        ("json_max_size", "16 MiB", "'16 MiB' is not a whole number of 0 or more"),
        ("json_max_size", -1, "-1 is not a whole number of 0 or more"),
        ("track_sessions", -1, "-1 is not a whole number of 0 or more"),
        ("track_sessions", "many", "'many' is not a whole number of 0 or more"),
        ("track_sessions", "1_0", "'1_0' is not a whole number of 0 or more"),
        ("track_sessions", True, "True is not a whole number of 0 or more"),
        ("on_move", 5, "5 is not a function: a config imports no code, so pass it in code"),
        ("on_move", "os:sep", "'os:sep' is not a function"),
        ("on_move", copy, "a module is not a function"),
        ("metrics", "statsd", "'statsd' is not one of 'prometheus'"),
        ("metrics_registry", object, "is not a prometheus_client.CollectorRegistry"),
        ("metrics_registry", Registry, "is not a prometheus_client.CollectorRegistry"),
        ("hide_worker_ids", "maybe", "'maybe' is not true or false"),
        ("sesion_id", "x", "unknown option; the nearest one is 'session_id'"),
        (5, "x", "unknown option"),
    ],
)
def test_a_fault_names_the_option_what_it_got_and_what_it_takes(
    key: Any, value: Any, problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        RoutingConfig.from_mapping({"gateway": GATEWAY, key: value})
    [(name, text)] = caught.value.faults
    assert name == str(key)
    assert problem in text
    assert f"{name}: {text}" == str(caught.value)


class Alarm:
    async def __call__(self, move: object) -> None:
        pass

    async def method(self, move: object) -> None:
        pass


async def alarm_later(move: object) -> None:
    pass


@pytest.mark.parametrize("on_move", [alarm_later, Alarm(), Alarm().method, partial(alarm_later)])
def test_a_function_that_nobody_would_await_is_a_fault(on_move: object) -> None:
    assert "is async: nobody would await it" in faults(on_move=on_move)["on_move"]


@pytest.mark.parametrize("secret", [12345, "", ["hush"]])
def test_a_fault_never_shows_the_secret(secret: Any) -> None:
    [(name, text)] = faults(key="digest", secret=secret).items()
    assert (name, text) == ("secret", "is not a string of one character or more")


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


def test_config_error_comes_whole_out_of_another_process() -> None:
    with pytest.raises(ConfigError) as caught:
        RoutingConfig("localhost")
    copied = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert copied.faults == caught.value.faults
    assert str(copied) == str(caught.value)


@pytest.mark.parametrize("config", [None, "http://gateway", [("gateway", GATEWAY)], 5])
def test_a_config_of_another_type_is_a_config_error(config: Any) -> None:
    problem = f"config: is a {type(config).__name__}: pass the table of options"
    with pytest.raises(ConfigError, match=problem):
        Routing(config)


def test_metrics_and_on_move_need_the_ledger() -> None:
    problem = "needs the ledger, and track_sessions = 0 switches it off"
    found = faults(metrics="prometheus", on_move=print, track_sessions=0)
    assert found == {"metrics": problem, "on_move": problem}
