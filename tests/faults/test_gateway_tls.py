"""TLS at the gateway, a real nginx before servers that answer with their names: who gets through to them."""

import contextlib
import dataclasses

import grpc
import pytest
from echo_servers import INFER, OWN_CONNECTION, EchoServer, RunningGateway, upstreams
from throwaway_ca import ThrowawayCa
from waiting import PATIENCE_S

from hstu_trt.contract.cli import run_verb
from hstu_trt.contract.errors import ConfigError
from hstu_trt.serving.fleet import command
from hstu_trt.serving.fleet.gateway_config import GatewaySettings, render
from hstu_trt.serving.tls import ServerTls

pytestmark = [pytest.mark.nginx, pytest.mark.faults]
NAME = "ranking.test"


@pytest.fixture(scope="module")
def ca(tmp_path_factory):
    return ThrowawayCa(tmp_path_factory.mktemp("ca"), "ours")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    return ThrowawayCa(tmp_path_factory.mktemp("foreign"), "others")


@contextlib.contextmanager
def gateway_with(folder, tls):
    servers = [EchoServer(f"s{index}") for index in range(2)]
    gateway = RunningGateway(folder, tls=tls)
    gateway.do("start", upstreams(servers))
    try:
        yield gateway, servers
    finally:
        gateway.close()
        for server in servers:
            server.stop()


@pytest.fixture(scope="module")
def mutual(ca, tmp_path_factory):
    """Its certificate is for servers only: nobody presents it as a client, unlike that of ``serve``."""
    pair = ca.issue("gateway", usages=(ThrowawayCa.SERVER,))
    with gateway_with(tmp_path_factory.mktemp("mutual"), ServerTls.checked(*pair, ca.path, asks_itself=False)) as made:
        yield made


def ask(url, ca, pair=None, name=NAME, user="7"):
    """Who answers. Raises grpc.RpcError."""
    cert, key = (None, None) if pair is None else (path.read_bytes() for path in pair)
    options = [("grpc.ssl_target_name_override", name), *OWN_CONNECTION]
    credentials = grpc.ssl_channel_credentials(ca.path.read_bytes(), key, cert)
    with grpc.secure_channel(url, credentials, options=options) as channel:
        return channel.unary_unary(INFER)(b"", metadata=[("x-user-id", user)], timeout=PATIENCE_S).decode()


def ask_plain(url):
    with grpc.insecure_channel(url, options=OWN_CONNECTION) as channel:
        return channel.unary_unary(INFER)(b"", timeout=PATIENCE_S).decode()


def test_the_right_certificate_gets_through(mutual, ca):
    """And routing is as without TLS: a user stays on one replica, others are on the other."""
    gateway, _ = mutual
    pair = ca.issue("client", names=())
    answers = [ask(gateway.url, ca, pair, user=str(user)) for user in range(12)]
    assert answers == [ask(gateway.url, ca, pair, user=str(user)) for user in range(12)]
    assert set(answers) == {"s0", "s1"}


STRANGER, UNREACHABLE = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE
INTRUDERS = {
    "no TLS": (lambda url, ca, foreign: ask_plain(url), UNREACHABLE),
    "no certificate": (lambda url, ca, foreign: ask(url, ca), STRANGER),
    "certificate of another CA": (lambda url, ca, foreign: ask(url, ca, foreign.issue("client")), STRANGER),
    "expired certificate": (lambda url, ca, foreign: ask(url, ca, ca.issue("old", days=-1)), STRANGER),
    "expects another's CA": (lambda url, ca, foreign: ask(url, foreign, ca.issue("client")), UNREACHABLE),
    "expects another's name": (lambda url, ca, foreign: ask(url, ca, ca.issue("client"), "other.test"), UNREACHABLE),
}


@pytest.mark.parametrize(("attempt", "code"), INTRUDERS.values(), ids=INTRUDERS)
def test_others_reach_no_replica(mutual, ca, foreign, attempt, code):
    gateway, servers = mutual
    served = [server.served for server in servers]
    with pytest.raises(grpc.RpcError) as refusal:
        attempt(gateway.url, ca, foreign)
    assert refusal.value.code() is code, refusal.value
    if code is STRANGER:
        assert "with a certificate of its clients' CA only" in refusal.value.details()
    assert [server.served for server in servers] == served


def test_tls_without_client_certificates(foreign, tmp_path):
    ca = ThrowawayCa(tmp_path / "a folder")
    with gateway_with(tmp_path / "gateway", ServerTls.checked(*ca.issue("gateway"))) as (gateway, _):
        assert ask(gateway.url, ca) in ("s0", "s1")
        with pytest.raises(grpc.RpcError):
            ask(gateway.url, foreign)
        with pytest.raises(grpc.RpcError):
            ask_plain(gateway.url)


def test_a_renewed_certificate_is_taken_at_the_next_reload(ca, foreign, tmp_path):
    """Same paths, as cert-manager does: what makes the fleet reload nginx brings it."""
    cert, key = ca.issue("renewed")
    with gateway_with(tmp_path, ServerTls.checked(cert, key)) as (gateway, servers):
        for old, new in zip((cert, key), foreign.issue("renewed"), strict=True):
            old.write_bytes(new.read_bytes())
        assert ask(gateway.url, ca) in ("s0", "s1")
        gateway.switch(upstreams(servers[:1]))
        assert ask(gateway.url, foreign) == "s0"


@pytest.mark.parametrize("character", ['"', "\\", "$", "\n"])
def test_paths_that_nginx_would_read_otherwise_are_refused(ca, tmp_path, character):
    tls = ServerTls.checked(*ca.issue("gateway"))
    settings = GatewaySettings(
        address="127.0.0.1", port=1, max_body=1, tls=dataclasses.replace(tls, cert=tmp_path / f"a{character}b")
    )
    with pytest.raises(ConfigError, match="nginx takes no path with"):
        render(settings, [], tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tls-cert", "x.pem"], "--tls-cert and --tls-key go together"),
        (["--tls-client-ca", "x.pem"], "--tls-client-ca needs --tls-cert and --tls-key"),
        (["--tls-cert", "none.pem", "--tls-key", "none.key"], "--tls-cert .*none.pem: No such file"),
    ],
)
def test_options_that_do_not_fit(deployment, tmp_path, capsys, options, said):
    given = ["--deployment", str(deployment.path), "--run", str(tmp_path / "run"), *options]
    assert run_verb(command.main, given, "hstu-trt fleet") == 2
    error = capsys.readouterr().err
    assert said.partition(".*")[0] in error and said.rpartition(".*")[2] in error
    assert not (tmp_path / "run").exists()


def test_an_open_door_without_a_lock_is_told(deployment, tmp_path, capsys):
    """Here the fleet then fails for want of a program."""
    given = ["--deployment", str(deployment.path), "--run", str(tmp_path / "run"), "--address", "0.0.0.0"]
    assert run_verb(command.main, [*given, "--port", "0", "--nginx", "/none"], "hstu-trt fleet") == 2
    assert "WARNING: gRPC on '0.0.0.0' without TLS" in capsys.readouterr().err
