"""The gateway alone, a real nginx, before servers that answer with their names: routing, refusals, reloads."""

import contextlib
import os
import re
import signal
import socket
import threading
from pathlib import Path

import grpc
import pytest
from echo_servers import INFER, OWN_CONNECTION, EchoServer, RunningGateway, call, upstreams
from waiting import PATIENCE_S, eventually

from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.serving.fleet.gateway import GatewayError
from hstu_trt.serving.fleet.gateway_config import MOST_HEADER_BYTES, Upstream, largest_request
from hstu_trt.serving.requests import pack, sample
from hstu_trt.serving.signature import REPLICA_LOST

pytestmark = [pytest.mark.nginx, pytest.mark.faults]

OPERATE = Path(__file__).parents[2] / "docs/operate.md"
RETRY = re.search(r"```json\n(.*?)```", OPERATE.read_text(), re.DOTALL)[1]
USERS = 400
MAX_BODY = 1 << 20


@pytest.fixture
def servers():
    running = [EchoServer(f"s{index}") for index in range(4)]
    yield running
    for server in running:
        server.stop()


@pytest.fixture
def gateway(tmp_path, servers):
    running = RunningGateway(tmp_path / "gateway", MAX_BODY)
    running.do("start", upstreams(servers[:3]))
    yield running
    running.close()


def ask_with(url, metadata):
    with grpc.insecure_channel(url, options=OWN_CONNECTION) as channel:
        return channel.unary_unary(INFER)(b"", metadata=metadata, timeout=PATIENCE_S)


def who_got(servers, request):
    """Who has begun to answer such a request."""
    return eventually(lambda: next((server for server in servers if server.last == request), None))


def moved(before, after):
    return [user for user, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]


def test_a_user_stays_on_one_replica_and_others_are_spread(gateway):
    first = gateway.users()
    assert gateway.users() == first
    assert all(first.count(name) > USERS / 3 / 3 for name in ("s0", "s1", "s2"))


def test_requests_without_a_user_are_spread(gateway):
    assert len({call(gateway.url) for _ in range(40)}) == 3
    assert len({call(gateway.url, user="") for _ in range(40)}) == 3


def test_one_more_replica_takes_its_share_and_moves_nobody_else(gateway, servers):
    before = gateway.users()
    gateway.switch(upstreams(servers))
    after = gateway.users()
    changed = moved(before, after)
    assert {after[user] for user in changed} == {"s3"}
    assert USERS / 4 / 3 < len(changed) < USERS / 4 * 2
    gateway.switch(upstreams(servers[:3]))
    assert gateway.users() == before


@pytest.mark.parametrize("how", ["down", "dead", "left out"])
def test_one_less_moves_its_own_users_only(gateway, servers, how):
    before = gateway.users()
    if how == "down":
        gateway.switch(upstreams(servers[:3], down=[servers[1]]))
    elif how == "left out":
        gateway.switch(upstreams([servers[0], servers[2]]))
    else:
        servers[1].stop()
    after = gateway.users()
    assert moved(before, after) == [user for user, name in enumerate(before) if name == "s1"]
    if how == "down":
        gateway.switch(upstreams(servers[:3]))
        assert gateway.users() == before


def test_what_a_dying_replica_was_answering_fails_and_the_client_may_send_it_again(gateway, servers):
    """nginx does not repeat a request that was sent, so no server gets one twice without its client's knowledge."""
    with socket.socket() as dying:
        dying.bind(("127.0.0.1", 0))
        dying.listen()

        def die():
            connection, _ = dying.accept()
            connection.recv(1 << 16)
            connection.close()

        thread = threading.Thread(target=die, daemon=True)
        thread.start()
        gateway.switch([Upstream(address=f"127.0.0.1:{dying.getsockname()[1]}"), *upstreams(servers, down=servers)])
        with pytest.raises(grpc.RpcError) as lost:
            call(gateway.url)
        thread.join()
    assert (lost.value.code(), lost.value.details()) == (grpc.StatusCode.UNAVAILABLE, REPLICA_LOST)
    assert not any(server.served for server in servers)


def test_a_reload_lets_running_requests_finish(gateway, servers):
    """And tells when none of them is left, so that the replica may be stopped."""
    user = gateway.users().index("s0")
    with grpc.insecure_channel(gateway.url) as channel:
        running = channel.unary_unary(INFER).future(b"hold", metadata=[("x-user-id", str(user))], timeout=PATIENCE_S)
        servers[0].wait_for(b"hold")
        gateway.do("apply", upstreams(servers[1:3]))
        assert not gateway.do("settled", 0.3)

        def who_answers():
            with contextlib.suppress(grpc.RpcError):
                return set(gateway.users())

        # Until nginx has told them to stop, workers of the config before take connections, too, and close them then.
        eventually(lambda: who_answers() == {"s1", "s2"})
        servers[0].let_go.set()
        assert running.result() == b"s0"
    assert gateway.do("settled", PATIENCE_S)


def test_reloads_under_load_fail_nothing(gateway, servers):
    """To a client that repeats UNAVAILABLE as the page for operators says."""
    stop, answers, failures = threading.Event(), [], []

    def send(index):
        with grpc.insecure_channel(gateway.url, options=[*OWN_CONNECTION, ("grpc.service_config", RETRY)]) as channel:
            while not stop.is_set():
                try:
                    answers.append(call(gateway.url, user=index, channel=channel))
                except grpc.RpcError as error:
                    failures.append((error.code(), error.details()))

    threads = [threading.Thread(target=send, args=(index,), daemon=True) for index in range(4)]
    for thread in threads:
        thread.start()
    for turn in range(20):
        gateway.switch(upstreams(servers[turn % 2 : 2 + turn % 2]))
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures and len(answers) > 100


REFUSED = {
    f"/inference.GRPCInferenceService/{method}": grpc.StatusCode.PERMISSION_DENIED
    for method in (
        "RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload", "SystemSharedMemoryRegister",
        "CudaSharedMemoryStatus", "TraceSetting", "LogSettings", "ModelStreamInfer", "ModelInferX", "modelinfer",
    )
} | {"/": grpc.StatusCode.PERMISSION_DENIED, "/v2/models/ranking/infer": grpc.StatusCode.PERMISSION_DENIED}  # fmt: skip


@pytest.mark.parametrize("method", REFUSED)
def test_methods_that_are_not_for_clients(gateway, servers, method):
    served = [server.served for server in servers]
    with pytest.raises(grpc.RpcError) as refusal:
        call(gateway.url, method=method)
    assert refusal.value.code() is REFUSED[method]
    assert [server.served for server in servers] == served


@pytest.mark.parametrize("method", ["ModelInfer", "ModelConfig", "ModelReady", "ServerReady"])
def test_methods_that_clients_need(gateway, method):
    assert call(gateway.url, method=f"/inference.GRPCInferenceService/{method}") in ("s0", "s1", "s2")


def test_a_request_that_is_too_large_is_refused_in_words(gateway):
    """gRPC frames a message with 5 bytes."""
    assert call(gateway.url, b"x" * (MAX_BODY - 5))
    with pytest.raises(grpc.RpcError) as refusal:
        call(gateway.url, b"x" * (MAX_BODY + 1))
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.value.details() == f"the request is larger than the {MAX_BODY} bytes that are served"


@pytest.mark.parametrize("headers", [1, 50], ids=["one long", "many"])
def test_headers_that_are_too_large_cost_their_own_connection_alone(gateway, servers, headers):
    size = MOST_HEADER_BYTES // headers
    with grpc.insecure_channel(gateway.url, options=OWN_CONNECTION) as other:
        held = other.unary_unary(INFER).future(b"hold", metadata=[("x-user-id", "1")], timeout=PATIENCE_S)
        server = who_got(servers, b"hold")
        before = [server.served for server in servers]
        with pytest.raises(grpc.RpcError) as refusal:
            ask_with(gateway.url, [(f"h{index}", "x" * size) for index in range(headers)])
        assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
        assert [server.served for server in servers] == before
        server.let_go.set()
        assert held.result().decode() == server.name
    assert ask_with(gateway.url, [(f"h{index}", "x" * (size // 2)) for index in range(headers)])


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_messages_are_refused_in_words(gateway, servers, algorithm):
    """1 GiB of zeros would be a megabyte on the wire."""
    with grpc.insecure_channel(gateway.url) as channel:
        infer = channel.unary_unary(INFER)
        with pytest.raises(grpc.RpcError) as refusal:
            infer(bytes(1 << 20), compression=algorithm, timeout=PATIENCE_S)
        assert refusal.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "without compression only" in refusal.value.details()
        assert not any(server.served for server in servers)
        assert infer(bytes(1000), compression=grpc.Compression.NoCompression, timeout=PATIENCE_S)


def test_no_replica_at_all(gateway, servers):
    for server in servers:
        server.stop()
    with pytest.raises(grpc.RpcError) as refusal:
        call(gateway.url)
    assert (refusal.value.code(), refusal.value.details()) == (grpc.StatusCode.UNAVAILABLE, REPLICA_LOST)


def test_not_http2(gateway):
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        connection.settimeout(PATIENCE_S)
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert b"Server: nginx/" not in connection.recv(4096)
    assert call(gateway.url)


def test_a_config_that_nginx_refuses_changes_nothing(gateway):
    before = gateway.users(40)
    with pytest.raises(GatewayError, match=r"nginx refuses .*invalid port in upstream"):
        gateway.do("apply", [Upstream(address="127.0.0.1:99999")])
    assert gateway.users(40) == before


def test_a_killed_master_is_started_again(gateway):
    os.kill(gateway.gateway.pid, signal.SIGKILL)
    gateway.do("restart")
    assert call(gateway.url)


@pytest.mark.parametrize("name", ["a b", "a;b", "{a}", "#a", "a$b", "'a", 'a"b', "a\\nb", "a\nb"], ids=repr)
def test_any_folder_will_do(tmp_path, servers, name):
    """nginx reads what paths are made of: blanks end a directive's argument, semicolons the directive."""
    folder = tmp_path / name
    running = RunningGateway(folder)
    try:
        running.do("start", upstreams(servers[:1]))
        assert call(running.url) == "s0"
        assert int((folder / "nginx.pid").read_text()) == running.gateway.pid
        assert {f"tmp_{kind}" for kind in ("client_body", "proxy")} <= {path.name for path in folder.iterdir()}
    finally:
        running.close()


def test_a_taken_port_is_told(tmp_path, servers):
    running = RunningGateway(tmp_path)
    with socket.socket() as other:
        other.bind(("127.0.0.1", running.port))
        other.listen()
        with pytest.raises(GatewayError, match="Address already in use"):
            running.do("start", upstreams(servers))
        running.close()


def test_the_largest_request_of_a_model_passes(exported):
    """What the limits allow, packed, against the bytes that the gateway lets through."""
    model = read_model_folder(exported("fp32"))
    limits, config = model.limits, model.ranking_config
    largest = largest_request(model)
    one = pack(config, [sample(config, limits)])
    per_event = sum(one[name].nbytes for name in one if name.startswith("uih_") and not name.endswith("offsets"))
    per_event /= one["uih_offsets"][-1]
    per_candidate = sum(one[name].nbytes for name in one if name.startswith("candidate_") and "offsets" not in name)
    per_candidate /= one["candidate_offsets"][-1]
    needed = limits.users * (limits.history * per_event + limits.candidates * per_candidate)
    assert needed < largest < 3 * needed + (1 << 17)
