"""An OpenTelemetry collector of one test: takes OTLP over HTTP on loopback and keeps the spans."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class TraceCollector:
    """A context manager; ``url`` is where spans go. They come in OTLP's JSON form, ids in hexadecimal."""

    def __init__(self):
        self._spans, self._changed = [], threading.Condition()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector._take(self.path, json.loads(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_port}/v1/traces"

    def _take(self, path, exported):
        assert path == "/v1/traces", path
        with self._changed:
            for resource in exported["resourceSpans"]:
                service = {pair["key"]: pair["value"].get("stringValue") for pair in resource["resource"]["attributes"]}
                for scope in resource["scopeSpans"]:
                    self._spans += [{**span, "service": service.get("service.name")} for span in scope["spans"]]
            self._changed.notify_all()

    def wait_for(self, enough, timeout_s):
        """The spans, once ``enough(spans)``, or those there are after the timeout."""
        with self._changed:
            self._changed.wait_for(lambda: enough(self._spans), timeout_s)
            return list(self._spans)
