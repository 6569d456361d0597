"""Prometheus metrics of refreshes and rows. Runs inside tritonserver only, which provides the backend's utilities."""

from __future__ import annotations

import threading
from typing import Any

import triton_python_backend_utils as pb_utils

from hstu_trt.serving.models.held import Board
from hstu_trt.serving.models.live_stages import Tally
from hstu_trt.serving.models.waiting_room import LoadCounts
from hstu_trt.serving.refresh.watching import Refresh

_PREFIX = "hstu_trt_"
_COUNTER, _GAUGE = "COUNTER", "GAUGE"
_FAMILIES = {
    "tables_info": (_GAUGE, "1 for the tables version and pair in use, 0 for earlier ones"),
    "tables_since_seconds": (_GAUGE, "Unix time since when this tables version is in use: its age is time() less this"),
    "tables_memory_bytes": (_GAUGE, "Bytes of rows in memory, of base and overlay"),
    "tables_instead_of_current": (
        _GAUGE,
        "1 while the version before CURRENT is served, since that was bad at the start",
    ),
    "tables_draining": (_GAUGE, "Old versions that running requests still read"),
    "tables_bad_ids_total": (_COUNTER, "Ids outside a table"),
    "table_rows_total": (_COUNTER, "Rows looked up by where they came from"),
    "remote_events_total": (_COUNTER, "What the client of the clusters counts, by event (tables/README.md)"),
    "remote_breakers_open": (_GAUGE, "Nodes of clusters that are passed over after failures"),
    "remote_without_cluster": (_GAUGE, "Groups of remote tables that a local copy serves until their cluster is there"),
    "shed_total": (_COUNTER, "Requests refused at once (UNAVAILABLE), since too many waited"),
    "begun_total": (_COUNTER, "Requests that work was begun on"),
    "waiting_requests": (_GAUGE, "Requests that wait in front of the model"),
    "waited_seconds_total": (_COUNTER, "Seconds that requests waited before work on them began"),
    "batches_total": (_COUNTER, "Batches run, by number of users"),
    "batch_seconds_total": (_COUNTER, "Seconds that batches took, by number of users"),
    "batch_tokens_total": (_COUNTER, "History events and candidates of the batches"),
    "refreshes_total": (_COUNTER, "Published versions that were served (ok) or refused"),
    "refresh_seconds": (_GAUGE, "Duration of the last refresh, from noticing to serving"),
    "restarts_total": (_COUNTER, "Times that serve has restarted this server, after it died, hung or answered wrong"),
}


class LiveMetrics:
    """The metrics of one model. Threads may share it.

    board: given to the one model of a server that tells of restarts, too.
    """

    def __init__(self, model: str, board: Board | None = None) -> None:
        self._model, self._board = model, board
        self._lock = threading.Lock()
        # The stub adds MetricFamily to the module after it has imported the model.
        self._families = {
            name: pb_utils.MetricFamily(
                name=_PREFIX + name, description=text, kind=getattr(pb_utils.MetricFamily, kind)
            )
            for name, (kind, text) in _FAMILIES.items()
        }
        self._metrics: dict[tuple[str, tuple[tuple[str, str], ...]], Any] = {}
        self._info: Any = None
        self._remote: dict[str, int] = {}
        for result in ("ok", "refused"):
            self._metric("refreshes_total", result=result)
        self._metric("shed_total")  # an alert on a series that is not there never fires

    def refreshed(self, refresh: Refresh) -> None:
        """Counts a refresh."""
        with self._lock:
            self._metric("refreshes_total", result="refused" if refresh.refused else "ok").increment(1)
            if refresh.refused is None:
                self._metric("refresh_seconds").set(refresh.seconds)

    def in_use(self, facts: dict[str, Any]) -> None:
        """Sets what is in use (``live_models.serves``)."""
        labels = {key: str(facts[key]) for key in ("tables_version", "form", "pair_id", "dense")}
        with self._lock:
            if self._info is not None:
                self._info.set(0)  # Triton may keep the series
            # Not among those held: the series of earlier versions go with their objects.
            self._info = self._families["tables_info"].Metric(labels={"model": self._model, **labels})
            self._info.set(1)
            self._metric("tables_since_seconds").set(facts["since"])
            self._metric("tables_memory_bytes").set(facts["memory_bytes"])
            self._metric("tables_instead_of_current").set(int(facts["instead_of"] is not None))

    def update(self, tally: Tally, draining: int) -> None:
        """Adds what was counted since the last call."""
        rows, bad = tally.take()
        with self._lock:
            for status, count in rows.items():
                self._metric("table_rows_total", status=status).increment(count)
            for table, count in bad.items():
                self._metric("tables_bad_ids_total", table=table).increment(count)
            self._metric("tables_draining").set(draining)
            self._note_restarts()

    def load(self, counts: LoadCounts) -> None:
        """Adds what the front door counted since the last call."""
        with self._lock:
            self._metric("shed_total").increment(counts.shed)
            self._metric("begun_total").increment(counts.begun)
            self._metric("waited_seconds_total").increment(counts.waited_s)
            self._metric("batch_tokens_total").increment(counts.tokens)
            for users, batches in counts.batches.items():
                self._metric("batches_total", users=str(users)).increment(batches)
                self._metric("batch_seconds_total", users=str(users)).increment(counts.batch_s[users])
            self._metric("waiting_requests").set(counts.waiting)

    def remote(self, counters: dict[str, int], troubles: dict[str, int]) -> None:
        """Adds what the remote tier has counted since the last call, and sets how it is (``Tiers``)."""
        with self._lock:
            for event, count in counters.items():
                self._metric("remote_events_total", event=event).increment(count - self._remote.get(event, 0))
            self._remote = counters
            for name, value in troubles.items():
                self._metric(f"remote_{name}").set(value)

    def _note_restarts(self) -> None:
        """Once: this server lives from one restart to the next.

        Not before ``serve`` says so: a series that began with 0 each time would count every restart again.
        """
        restarts = None if self._board is None else self._board.restarts()
        if restarts is not None:
            self._board = None
            # Held like the others, or Triton would drop it.
            self._metrics["restarts_total", ()] = self._families["restarts_total"].Metric(labels={})
            self._metrics["restarts_total", ()].increment(restarts)

    def _metric(self, family: str, **labels: str) -> Any:
        key = (family, tuple(sorted(labels.items())))
        if key not in self._metrics:
            self._metrics[key] = self._families[family].Metric(labels={"model": self._model, **labels})
        return self._metrics[key]
