"""``tables.json``: what it may say, and what is refused by name."""

import json

import pytest

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.tables.tier_settings import Remote, TableTier, TierSettings, read_tier_settings

NODES = ["10.0.0.1:6379", "10.0.0.2:6379"]
FULL = {
    "_comment": "two clusters would be fine too",
    "default": {"tier": "resident"},
    "tables": {
        "item_id": {
            "tier": "remote", "nodes": NODES, "deadline_ms": 8, "local_copy": False, "on_failure": "default",
            "password_file": "/run/secrets/redis", "tls_ca": "ca.pem", "_why": "1 TB",
        },
        "user_id": {"tier": "mapped"},
    },
}  # fmt: skip


def test_settings_survive():
    settings = TierSettings.from_json(FULL)
    remote = settings.of("item_id").remote
    assert remote == Remote(
        nodes=tuple(NODES), deadline_ms=8, local_copy=False, on_failure="default",
        password_file="/run/secrets/redis", tls_ca="ca.pem",
    )  # fmt: skip
    assert (settings.of("user_id").tier, settings.of("another").tier) == ("mapped", "resident")
    assert [settings.of(name).needs_files for name in ("item_id", "user_id")] == [False, True]
    assert TierSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    assert TierSettings.from_json({}) == TierSettings()
    assert TierSettings().of("any") == TableTier(tier="mapped")


def remote(**changes):
    return {"tables": {"item_id": {"tier": "remote", "nodes": NODES, **changes}}}


REFUSED = {
    "no object": ([], "holds list, not an object"),
    "unknown key": ({"table": {}}, "unknown key 'table'; did you mean 'tables'"),
    "tables no object": ({"tables": []}, "'tables' must be an object"),
    "entry no object": ({"tables": {"a": "resident"}}, "table 'a': expected an object"),
    "unknown tier": ({"default": {"tier": "gpu"}}, "default: tier 'gpu': choose from mapped, resident, remote"),
    "tier no text": ({"default": {"tier": []}}, "choose from mapped"),
    "nodes of a mapped table": ({"default": {"tier": "mapped", "nodes": NODES}}, "unknown key 'nodes'"),
    "no nodes": ({"tables": {"a": {"tier": "remote"}}}, "table 'a': a remote table needs nodes"),
    "empty nodes": (remote(nodes=[]), "table 'item_id': nodes of a cluster are written host:port, got none"),
    "a node without a port": (remote(nodes=["host"]), "host:port, got host"),
    "nodes as a text": (remote(nodes="10.0.0.1:6379"), "nodes must be a list"),
    "a misspelt key": (remote(deadline=5), "unknown key 'deadline'; did you mean 'deadline_ms'"),
    "no time": (remote(deadline_ms=0), "deadline_ms 0: more than 0"),
    "time for ever": (remote(deadline_ms=1e9), "at most 60000"),
    "time as a text": (remote(deadline_ms="5"), "deadline_ms must be milliseconds, got '5'"),
    "NaN": (remote(deadline_ms=float("nan")), "deadline_ms nan"),
    "a flag as a number": (remote(local_copy=1), "local_copy must be true or false"),
    "a number as a flag": (remote(deadline_ms=True), "deadline_ms must be milliseconds"),
    "unknown failure": (remote(on_failure="ignore"), "on_failure 'ignore': choose from fail, default"),
    "a password": (remote(password="hunter2"), "'password' does not belong into a deployment; name a password_file"),
    "a user": (remote(user="reader"), "HSTU_TRT_REDIS_USER"),
    "a login in a node": (remote(nodes=["reader:hunter2@10.0.0.1:6379"]), "without scheme and login"),
    "a node as a URL": (remote(nodes=["h:1", "redis://:hunter2@10.0.0.1:6379"]), "HSTU_TRT_REDIS_PASSWORD"),
    "a URL in place of nodes": (remote(nodes="redis://:hunter2@10.0.0.1:6379"), "nodes must be a list"),
    "a URL in place of a table": ({"tables": {"a": "redis://:hunter2@h:1"}}, "expected an object"),
    "a password as a comment": (remote(_password="hunter2"), "'_password' does not belong into a deployment"),
    "a password beside the tables": ({"password": "hunter2"}, "'password' does not belong into a deployment"),
    "a password of a mapped table": ({"default": {"_Password": "hunter2"}}, "'_Password' does not belong"),
    "a password in a list": (remote(password_file=["hunter2"]), "password_file must be the path of a file, got a list"),
    "an empty path": (remote(password_file=""), "password_file must be the path of a file, got none"),
    "port 0": (remote(nodes=["h:0"]), "node h:0: a port is between 1 and 65535"),
    "port 99999": (remote(nodes=["h:99999"]), "node h:99999: a port is between 1 and 65535"),
    "two nodes in one": (remote(nodes=["h:1,evil:2"]), "host:port"),
    "TLS and not": (remote(tls=False, tls_ca="ca.pem"), "ask for TLS"),
    "a default row that is never used": (remote(on_failure="default"), 'add "local_copy": false'),
    "no time to speak of": (remote(deadline_ms=1e-9), "deadline_ms 1e-09: more than 0"),
    "a certificate without its key": (remote(tls_cert="c.pem"), "come together"),
}


@pytest.mark.parametrize(("document", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_settings_are_named(document, message):
    with pytest.raises(ConfigError) as caught:
        TierSettings.from_json(document)
    assert message in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_unknown_tables_are_named():
    with pytest.raises(ConfigError, match=r"no table 'item_id'; did you mean 'item_ids'.*tables: item_ids, user_id"):
        TierSettings.from_json(FULL).check_names(["user_id", "item_ids"])


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "tables.json").write_text('{"tables": {"a": {"tier": "resident"}, "a": {"tier": "mapped"}}}')
    with pytest.raises(ConfigError, match="key 'a' is there twice"):
        read_tier_settings(tmp_path / "tables.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_unreadable_files_are_named(tmp_path, content):
    (tmp_path / "tables.json").write_bytes(content)
    with pytest.raises(ArtefactError, match=r"tables\.json cannot be read as JSON"):
        read_tier_settings(tmp_path / "tables.json")
    with pytest.raises(ArtefactError, match="cannot be read"):
        read_tier_settings(tmp_path / "absent.json")
