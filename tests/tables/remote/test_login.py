"""Passwords, permissions and TLS, on a server of its own; and no secret in a message."""

import os
import shutil
import subprocess

import numpy as np
import pytest
from remote_tables import SHAPES, push, table_values

from hstu_trt.bench.tables.local_cluster import free_ports, start_cluster
from hstu_trt.tables.remote import RemoteTables
from hstu_trt.tables.remote_cluster import Cluster, ClusterOptions, Credentials, Tls
from hstu_trt.tables.remote_push import publish
from hstu_trt.tables.remote_resp import RemoteError

pytestmark = pytest.mark.redis

PASSWORD = "correct horse"


def openssl(*arguments):
    if shutil.which("openssl") is None and os.environ.get("CI") != "true":
        pytest.skip("no openssl to make certificates with")
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def make_certificate(folder, name, address):
    """A self-signed certificate, which is its own authority."""
    openssl(
        "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
        "-subj", f"/CN={name}", "-addext", f"subjectAltName=IP:{address}",
        "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.crt",
    )  # fmt: skip
    return folder / f"{name}.crt"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificates")
    for name, address in (("server", "127.0.0.1"), ("stranger", "127.0.0.1"), ("elsewhere", "127.0.0.9")):
        make_certificate(folder, name, address)
    return folder


def serve(folder, certificates, certificate):
    files = {
        "tls_cert_file": str(certificates / f"{certificate}.crt"),
        "tls_key_file": str(certificates / f"{certificate}.key"),
        "tls_ca_cert_file": str(certificates / f"{certificate}.crt"),
    }
    tls_port = str(free_ports(1)[0])
    cluster = start_cluster(
        folder, masters=1, password=PASSWORD, tls_port=tls_port, tls_auth_clients="no", tls_cluster="yes", **files
    )
    return cluster, f"127.0.0.1:{tls_port}"


@pytest.fixture(scope="module")
def secured(tmp_path_factory, certificates, folder):
    """(cluster, its address with TLS) of one node that wants a password."""
    cluster, with_tls = serve(tmp_path_factory.mktemp("secured"), certificates, "server")
    try:
        cluster.wait()
        with Cluster(ClusterOptions(nodes=cluster.names, credentials=Credentials(password=PASSWORD))) as client:
            push(client, folder, "v1")
            for name in SHAPES:
                publish(client, name, "v1")
        yield cluster, with_tls
    finally:
        cluster.stop()


def users(options):
    with Cluster(options) as client:
        return RemoteTables(client, ["users"], deadline_ms=2000).lookup("users", np.arange(311))[0]


LOGIN = Credentials(password=PASSWORD)


def test_the_right_password(secured):
    options = ClusterOptions(nodes=secured[0].names, credentials=LOGIN)
    np.testing.assert_array_equal(users(options), table_values("users"))


@pytest.mark.parametrize(
    ("login", "told"),
    [
        (Credentials(), "NOAUTH"),
        (Credentials(password="wrong secret"), r"refused the login \(WRONGPASS\)"),
        (Credentials(user="nobody", password=PASSWORD), r"refused the login \(WRONGPASS\)"),
    ],
)
def test_the_wrong_login_is_told_without_the_password(secured, login, told):
    with pytest.raises(RemoteError, match=told) as caught:
        Cluster(ClusterOptions(nodes=secured[0].names, credentials=login))
    assert "secret" not in str(caught.value)
    assert PASSWORD not in str(caught.value)


def test_a_login_that_is_withdrawn_falls_to_the_local_copy(secured, folder):
    (node,) = secured[0].nodes
    node.command("ACL", "SETUSER", "leaver", "on", ">pw", "~*", "+@all")
    with Cluster(ClusterOptions(nodes=(node.name,), credentials=Credentials(user="leaver", password="pw"))) as client:
        tables = RemoteTables(client, ["users"], local=folder, deadline_ms=2000)
        node.command("ACL", "DELUSER", "leaver")
        rows, status = tables.lookup("users", np.arange(311))
        np.testing.assert_array_equal(rows, table_values("users"))
        assert (status == 1).all()
        assert tables.counters()["auth_failures"] > 0


def test_a_reader_needs_few_permissions(secured, monkeypatch):
    (node,) = secured[0].nodes
    node.command("ACL", "SETUSER", "reader", "on", ">pw", "~e:*", "+hmget", "+cluster|slots", "+readonly", "+asking")
    monkeypatch.setenv("HSTU_TRT_REDIS_USER", "reader")
    monkeypatch.setenv("HSTU_TRT_REDIS_PASSWORD", "pw")
    options = ClusterOptions(nodes=(node.name,), credentials=Credentials.read())
    np.testing.assert_array_equal(users(options), table_values("users"))
    with Cluster(options) as client, pytest.raises(RemoteError, match="NOPERM"):
        publish(client, "users", "v1")


def test_tls(secured, certificates):
    options = ClusterOptions(nodes=(secured[1],), credentials=LOGIN, tls=Tls(authorities=certificates / "server.crt"))
    np.testing.assert_array_equal(users(options), table_values("users"))
    with Cluster(options) as client:
        # The map names the port with TLS to a client that came with TLS.
        assert list(client.breakers()) == [secured[1]]


@pytest.mark.parametrize("trusted", ["stranger", None])
def test_an_unknown_authority_is_refused(secured, certificates, trusted):
    tls = Tls(authorities=certificates / f"{trusted}.crt" if trusted else None)
    with pytest.raises(RemoteError, match="self-signed certificate"):
        Cluster(ClusterOptions(nodes=(secured[1],), credentials=LOGIN, tls=tls))


def test_a_certificate_for_another_address_is_refused(secured, certificates):
    (node,) = secured[0].nodes
    for name in ("cert", "key", "ca-cert"):
        suffix = "key" if name == "key" else "crt"
        node.settings = {**node.settings, f"tls-{name}-file": str(certificates / f"elsewhere.{suffix}")}
    reload = ["CONFIG", "SET"]
    for name in ("tls-cert-file", "tls-key-file", "tls-ca-cert-file"):
        reload += [name, node.settings[name]]
    node.command(*reload)
    with pytest.raises(RemoteError, match="IP address mismatch"):
        Cluster(
            ClusterOptions(nodes=(secured[1],), credentials=LOGIN, tls=Tls(authorities=certificates / "elsewhere.crt"))
        )


@pytest.mark.parametrize("file", ["authorities", "certificate"])
def test_a_tls_file_that_is_none_is_named(certificates, tmp_path, file):
    (tmp_path / "broken.pem").write_text("no certificate")
    files = {file: tmp_path / "broken.pem"} | ({"key": tmp_path / "broken.pem"} if file == "certificate" else {})
    files.setdefault("authorities", certificates / "server.crt")
    with pytest.raises(RemoteError, match=rf"TLS: {file} .*broken.pem"):
        Cluster(ClusterOptions(nodes=("127.0.0.1:1",), tls=Tls(**files)))


def test_tls_against_a_plain_port_is_refused(secured, certificates):
    tls = Tls(authorities=certificates / "server.crt")
    options = ClusterOptions(nodes=secured[0].names, credentials=LOGIN, tls=tls, connect_ms=500)
    with pytest.raises(RemoteError, match="cluster 127"):
        Cluster(options)
