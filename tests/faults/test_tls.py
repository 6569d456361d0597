"""TLS on gRPC: who gets scores from a real server, and which files are refused before it starts."""

import subprocess
import sys

import numpy as np
import pytest
from served import Serve, in_process, request_of
from throwaway_ca import ThrowawayCa

from hstu_trt.contract.errors import ConfigError
from hstu_trt.serving.answers import ServerError
from hstu_trt.serving.client import RankingClient
from hstu_trt.serving.tls import ClientTls, ServerTls

NAME = "ranking.test"


@pytest.fixture(scope="module")
def ca(tmp_path_factory):
    return ThrowawayCa(tmp_path_factory.mktemp("ca"), "ours")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    return ThrowawayCa(tmp_path_factory.mktemp("foreign"), "others")


@pytest.fixture(scope="module")
def pairs(ca, foreign):
    return {"server": ca.issue("server"), "client": ca.issue("client", names=()), "foreign": foreign.issue("client")}


@pytest.fixture(scope="module")
def served(deployment, ca, pairs):
    """Mutual TLS."""
    cert, key = map(str, pairs["server"])
    serve = Serve(deployment, "--tls-cert", cert, "--tls-key", key, "--tls-client-ca", str(ca.path))
    yield serve
    assert serve.stop() == 0
    port = serve.url.rpartition(":")[2]
    assert not (deployment.run / f"restarts-{port}.json").exists(), "serve's own canaries got in"


def client_of(ca, pair=None, name=NAME):
    cert, key = pair or (None, None)
    return ClientTls(ca=ca.path, cert=cert, key=key, server_name=name)


@pytest.mark.triton
@pytest.mark.faults
@pytest.mark.parametrize("model", ["ranking", "ranking_fused"])
def test_the_right_certificate_gets_scores(deployment, served, ca, pairs, model):
    request = request_of(deployment, 8, 5)
    with RankingClient(served.url, model, timeout_s=20, tls=client_of(ca, pairs["client"])) as client:
        scores = client.rank(request.user, request.history, request.candidates)
    assert np.abs(scores - in_process(deployment, model, request)).max() <= 1e-6


# who -> how it speaks; each would get the model's config, and then scores, if it were let in
INTRUDERS = {
    "no TLS": lambda ca, foreign, pairs: None,
    "no certificate": lambda ca, foreign, pairs: client_of(ca),
    "certificate of another CA": lambda ca, foreign, pairs: client_of(ca, pairs["foreign"]),
    "expects another server's CA": lambda ca, foreign, pairs: client_of(foreign, pairs["client"]),
    "expects another server's name": lambda ca, foreign, pairs: client_of(ca, pairs["client"], "other.test"),
    "expired certificate": lambda ca, foreign, pairs: client_of(ca, ca.issue("old", days=-1)),
}


@pytest.mark.triton
@pytest.mark.faults
@pytest.mark.parametrize("who", INTRUDERS)
def test_others_are_refused(served, ca, foreign, pairs, who):
    with pytest.raises(ServerError, match="UNAVAILABLE"):
        RankingClient(served.url, timeout_s=20, tls=INTRUDERS[who](ca, foreign, pairs))


@pytest.mark.triton
@pytest.mark.faults
def test_tls_without_client_certificates(deployment, ca, foreign, pairs):
    """The server's name is its address, and the sample client needs no name then."""
    cert, key = ca.issue("by_address", names=("127.0.0.1",))
    serve = Serve(deployment, "--tls-cert", str(cert), "--tls-key", str(key))
    ask = [sys.executable, "-m", "hstu_trt.serving.client", "--url", serve.url, "--tls-ca"]
    for trusted, code, said in ((ca, 0, "rank"), (foreign, 1, "CERTIFICATE_VERIFY_FAILED")):
        answer = subprocess.run([*ask, str(trusted.path)], capture_output=True, text=True, timeout=60, check=False)
        assert answer.returncode == code and said in answer.stdout + answer.stderr, answer
    with pytest.raises(ServerError, match="UNAVAILABLE"):
        RankingClient(serve.url, timeout_s=20)
    assert serve.stop() == 0


def refusals(ca, foreign, folder):
    """case -> (certificate, key, the clients' CA, what the error says)."""
    cert, key = ca.issue("good")
    text = folder / "text.pem"
    text.write_text("no certificate")
    text.chmod(0o600)
    locked = folder / "locked.key"
    subprocess.run(
        ["openssl", "ec", "-in", str(key), "-aes128", "-passout", "pass:x", "-out", str(locked)],
        check=True,
        capture_output=True,
    )
    server_only = ca.issue("server_only", usages=(ThrowawayCa.SERVER,))
    return {
        "no certificate": (folder / "none.pem", key, None, "--tls-cert .*none.pem: No such file"),
        "no key": (cert, folder / "none.key", None, "--tls-key .*none.key: No such file"),
        "a folder": (folder, key, None, "--tls-cert .*: Is a directory"),
        "text": (text, key, None, "--tls-cert .*text.pem holds no PEM certificate"),
        "text as key": (cert, text, None, "--tls-key .*text.pem is no private key"),
        "locked key": (cert, locked, None, "--tls-key .*locked.key is no private key that a server can open alone"),
        "open key": (*ca.issue("open", mode=0o644), None, r"open to every user of this machine: chmod o= \S+open.key"),
        "another's key": (cert, foreign.issue("other")[1], None, "is not the key of the first certificate"),
        "expired": (*ca.issue("past", days=-1), None, "--tls-cert .*past.pem is valid from .* and now it is"),
        "no name": (*ca.issue("nameless", names=()), None, "--tls-cert .*nameless.pem has no subjectAltName"),
        "no clients' CA": (cert, key, folder / "none.pem", "--tls-client-ca .*none.pem: No such file"),
        "for servers only": (*server_only, ca.path, "is for servers only, but .* serverAuth and clientAuth"),
    }


CASES = [
    "no certificate", "no key", "a folder", "text", "text as key", "locked key", "open key", "another's key", "expired",
    "no name", "no clients' CA", "for servers only",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_files_are_checked_before_the_launch(ca, foreign, tmp_path, case):
    cert, key, client_ca, said = refusals(ca, foreign, tmp_path)[case]
    with pytest.raises(ConfigError, match=said):
        ServerTls.checked(cert, key, client_ca)


def test_every_refusal_is_tested(ca, foreign, tmp_path):
    assert sorted(refusals(ca, foreign, tmp_path)) == sorted(CASES)


def test_files_that_are_good(ca, pairs):
    tls = ServerTls.checked(*pairs["server"], ca.path)
    assert tls.server_name == NAME
    assert tls.own_client() == ClientTls(ca=tls.cert, cert=tls.cert, key=tls.key, server_name=NAME)
    assert ServerTls.checked(*ca.issue("any_use", usages=()), ca.path).own_client().cert is not None
    assert ServerTls.checked(*ca.issue("server_only", usages=(ThrowawayCa.SERVER,))).own_client().cert is None


@pytest.mark.parametrize(
    ("program", "options", "said"),
    [
        ("serve", ["--tls-cert", "x.pem"], "--tls-cert and --tls-key go together"),
        ("serve", ["--tls-key", "x.key"], "--tls-cert and --tls-key go together"),
        ("serve", ["--tls-client-ca", "x.pem"], "--tls-client-ca needs --tls-cert and --tls-key"),
        ("client", ["--tls-cert", "x.pem"], "need --tls-ca"),
        ("client", ["--tls-name", "x"], "need --tls-ca"),
        ("client", ["--tls-ca", "x.pem", "--tls-cert", "x.pem"], "go together"),
        ("client", ["--tls-ca", "none.pem"], "--tls-ca none.pem: No such file"),
    ],
)
def test_options_that_do_not_fit(deployment, program, options, said):
    given = ["--deployment", str(deployment.path)] if program == "serve" else []
    command = [sys.executable, "-m", f"hstu_trt.serving.{program}", *given, *options]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 2 and said in answer.stderr, answer
