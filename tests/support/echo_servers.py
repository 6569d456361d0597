"""gRPC servers that answer any method with their name, and a real nginx before them: no model, so that it is quick."""

import asyncio
import threading
from concurrent import futures

import grpc
from waiting import PATIENCE_S, eventually

from hstu_trt.serving.fleet.gateway import Gateway, find_nginx
from hstu_trt.serving.fleet.gateway_config import GatewaySettings, Upstream
from hstu_trt.serving.server import LOOPBACK, choose_port

INFER = "/inference.GRPCInferenceService/ModelInfer"
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
"""Channels share connections otherwise: one could set out on a connection that a reload of nginx is about to close."""


class EchoServer(grpc.GenericRpcHandler):
    """Answers with its name; a request ``hold`` lasts until ``let_go``."""

    def __init__(self, name, port=0):
        self.name, self.served, self.last = name, 0, None
        self.let_go = threading.Event()
        self._server = grpc.server(futures.ThreadPoolExecutor(32), options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((self,))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{self.port}"
        self._server.start()

    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(self._answer)

    def _answer(self, request, context):
        self.served += 1
        self.last = request
        if request == b"hold":
            self.let_go.wait(PATIENCE_S)
        return self.name.encode()

    def wait_for(self, request):
        """Until it has begun to answer such a request."""
        eventually(lambda: self.last == request, f"{self.name} got no {request!r}")

    def stop(self):
        """As if killed: what it was answering gets no answer."""
        stopped = self._server.stop(0)
        self.let_go.set()
        stopped.wait()


def call(url, request=b"", *, user=None, method=INFER, channel=None):
    """Sends one request; returns the name of who answered, or raises grpc.RpcError."""
    metadata = [("x-user-id", str(user))] if user is not None else []
    own = channel or grpc.insecure_channel(url, options=OWN_CONNECTION)
    try:
        return own.unary_unary(method)(request, metadata=metadata, timeout=PATIENCE_S).decode()
    finally:
        if channel is None:
            own.close()


def settings_for(port, max_body=1 << 20, timeout_s=5, tls=None):
    return GatewaySettings(address="127.0.0.1", port=port, max_body=max_body, timeout_s=timeout_s, tls=tls)


class RunningGateway:
    """A gateway with an event loop of its own, so that tests need none."""

    def __init__(self, folder, max_body=1 << 20, tls=None):
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.port = choose_port(LOOPBACK, 0)
        self.url = f"127.0.0.1:{self.port}"
        self.gateway = Gateway(find_nginx(), folder, settings_for(self.port, max_body, tls=tls))

    def do(self, method, *args):
        return asyncio.run_coroutine_threadsafe(getattr(self.gateway, method)(*args), self.loop).result(60)

    def switch(self, upstreams):
        """Until nothing is answered by the old config."""
        self.do("apply", upstreams)
        assert self.do("settled", PATIENCE_S)

    def users(self, count=400):
        """Who answers each user."""
        with grpc.insecure_channel(self.url, options=OWN_CONNECTION) as channel:
            return [call(self.url, user=user, channel=channel) for user in range(count)]

    def close(self):
        self.do("stop")
        self.loop.call_soon_threadsafe(self.loop.stop)


def upstreams(servers, down=()):
    return [Upstream(address=server.address, down=server in down) for server in servers]
