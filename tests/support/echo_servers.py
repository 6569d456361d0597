"""gRPC servers that answer any method with their name, and a real nginx before them: no model, so that it is quick."""

import threading
import time
from concurrent import futures

import grpc

from hstu_trt.serving.gateway_config import GatewaySettings

INFER = "/inference.GRPCInferenceService/ModelInfer"


class EchoServer(grpc.GenericRpcHandler):
    """Answers with its name; a request ``sleep S`` takes S seconds, and ``hold`` lasts until ``let_go``."""

    def __init__(self, name, port=0):
        self.name, self.served, self.let_go, self.arrived = name, 0, threading.Event(), threading.Event()
        self._server = grpc.server(futures.ThreadPoolExecutor(32), options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((self,))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{self.port}"
        self._server.start()

    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(self._answer)

    def _answer(self, request, context):
        self.served += 1
        self.arrived.set()
        if request.startswith(b"sleep"):
            time.sleep(float(request.split()[1]))
        elif request == b"hold":
            self.let_go.wait(30)
        return self.name.encode()

    def stop(self):
        self.let_go.set()
        self._server.stop(0).wait()


def call(url, request=b"", *, user=None, method=INFER, timeout=10.0, channel=None):
    """Sends one request; returns the name of who answered, or raises grpc.RpcError."""
    metadata = [("x-user-id", str(user))] if user is not None else []
    own = channel or grpc.insecure_channel(url)
    try:
        return own.unary_unary(method)(request, metadata=metadata, timeout=timeout).decode()
    finally:
        if channel is None:
            own.close()


def settings_for(port, max_body=1 << 20, timeout_s=5):
    return GatewaySettings(address="127.0.0.1", port=port, max_body=max_body, timeout_s=timeout_s)
