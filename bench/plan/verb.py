"""``hstu-trt bench plan``: how many machines, how much memory and what cost for a rate, a table and a bound on latency.

The rate of one accelerator comes from measured rows: the server scenario's where the bound is the same, else from a
simulated queue over the service times that the rows hold (``queueing.py``), whose predictions are first held
against the measured runs at fixed rates. Without rows, --per-gpu states it. Every assumption is printed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hstu_trt.bench.arguments import count, not_negative, positive, suite_parser
from hstu_trt.bench.load.rows import SUITE
from hstu_trt.bench.load.scenarios import Bound
from hstu_trt.bench.load.triton_statistics import TRITON
from hstu_trt.bench.plan.capacity import GIB, Demand, Fleet, placements
from hstu_trt.bench.plan.queueing import ServiceCurve, fit_curve, predict_ms, rate_within, scatter_of
from hstu_trt.bench.result_rows import ResultRow, latest, read_rows
from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.tensors import ENSEMBLE, FUSED, STAGES
from hstu_trt.contract.text import text_table
from hstu_trt.serving.cuda_steps import CudaSettings

_CALIBRATING = ("single", "closed", "offline")
_CHECKED = ("open", "server")
_PREDICTED = ("p50", "p90", "p99")
CHECK_HEADER = ("run", "req/s", *(f"{p} {side}" for p in _PREDICTED for side in ("measured", "simulated")))


@dataclass(frozen=True, kw_only=True)
class Model:
    """A served model as a row of queues."""

    curves: tuple[ServiceCurve, ...]
    overhead_s: float

    def predict(self, rate: float) -> dict[str, float]:
        """Latency percentiles in ms at a rate."""
        return predict_ms(self.curves, rate, overhead_s=self.overhead_s)


def model_of(rows: Sequence[ResultRow], served: str, *, max_batch: int) -> Model:
    """Service times and overhead of a served model, from its rows without arrivals of their own.

    Raises ConfigError where a scenario is missing.
    """
    mine = [row for row in rows if row.details["served"] == served and row.details["client"] == "hstu-trt"]
    single = next((row for row in mine if row.details["scenario"] == "single"), None)
    calibrating = [row for row in mine if row.details["scenario"] in _CALIBRATING]
    if single is None:
        raise ConfigError(f"there is no row of scenario single of {served} to take the overhead from: bench serve")
    if served == FUSED and single.details["deployment"].get("flavour") == "cuda":
        return _micro_batched(single, calibrating)
    names = STAGES if served == ENSEMBLE else (served,)
    _require_real_batches(calibrating, names[0])
    latency = single.details["run"]["latency_ms"]
    scatter = scatter_of(latency["p50"], latency["p90"])
    curves = []
    for name in names:
        batches = [row.details["steps"][name]["batches"] for row in calibrating if name in row.details["steps"]]
        if served == ENSEMBLE:  # a step's service time grows with the load, since the steps share the machine
            batches = [row.details["steps"][name]["batches"] for row in calibrating[-1:]]
        curves.append(fit_curve(batches, max_batch=max_batch if served == FUSED else 1, scatter=scatter))
    own = sum(
        step["ms"]["total"] - step["ms"]["queue"] for name, step in single.details["steps"].items() if name in names
    )
    return Model(curves=tuple(curves), overhead_s=max(0.0, latency["mean"] - own) / 1e3)


def _require_real_batches(rows: Sequence[ResultRow], door: str) -> None:
    """Raises ConfigError for rows taken from outside: rows from before models took requests in name no source."""
    if any(row.details["steps"].get(door, {}).get("source") == TRITON for row in rows):
        raise ConfigError(
            f"the rows hold Triton's statistics of {door}, which end where it takes requests in: "
            "measure again with bench serve and without --url, which opens the server's metrics"
        )


def _micro_batched(single: ResultRow, calibrating: Sequence[ResultRow]) -> Model:
    """The flavour ``cuda``, which packs requests behind Triton's back: Triton's service times end at the hand-over.

    A micro-batch takes as long as its share of the highest throughput; what one request alone takes beyond that is
    overhead, which overlaps with other requests' work.
    """
    most = max((row.per_s or 0.0 for row in calibrating if row.details["scenario"] == "offline"), default=0.0)
    if not most:
        raise ConfigError("there is no row of scenario offline to take the throughput from: bench serve")
    latency = single.details["run"]["latency_ms"]
    tokens = float(single.details["tokens_per_s"]) / float(single.per_s or 1.0)
    curve = ServiceCurve(
        seconds={1: 1 / most},
        max_batch=max(1, round(CudaSettings().batch_tokens / max(tokens, 1.0))),
        scatter=scatter_of(latency["p50"], latency["p90"]),
    )
    return Model(curves=(curve,), overhead_s=max(0.0, latency["mean"] / 1e3 - 1 / most))


def checked_predictions(
    rows: Sequence[ResultRow], served: str, model: Model
) -> list[tuple[ResultRow, dict[str, float]]]:
    """Every measured run at a rate with what the simulation says for it."""
    runs = [row for row in rows if row.details["served"] == served and row.details["scenario"] in _CHECKED]
    mine = [row for row in runs if row.details["client"] == "hstu-trt"]
    return [(row, model.predict(float(row.details["run"]["requested_per_s"]))) for row in mine]


def check_table(found: Sequence[tuple[ResultRow, dict[str, float]]]) -> str:
    """Measured against simulated, in ms."""
    lines = []
    for row, predicted in found:
        measured = row.details["run"]["latency_ms"]
        cells = [f"{side[p]:.2f}" for p in _PREDICTED for side in (measured, predicted)]
        lines.append((row.variant, f"{row.details['run']['requested_per_s']:.1f}", *cells))
    return text_table(CHECK_HEADER, lines)


def rate_of_one(rows: Sequence[ResultRow], served: str, model: Model, bound: Bound) -> tuple[float, str]:
    """Requests per second of one machine within the bound, and where the figure comes from."""
    for row in rows:
        found = row.details.get("found", {})
        if row.details["served"] == served and found.get("bound") == bound.text and found.get("kept"):
            return float(found["rate"]), f"measured: {row.variant}, {row.device}, {row.date[:10]}"
    rate = rate_within(model.curves, bound, overhead_s=model.overhead_s)
    return rate, f"simulated from service times of {rows[0].device}, {rows[0].date[:10]}"


def _parser() -> argparse.ArgumentParser:
    parser = suite_parser("plan", __doc__)
    parser.add_argument("--rate", type=positive, required=True, help="requests per second at the peak")
    parser.add_argument("--slo-ms", type=positive, default=80.0, help="bound on the latency (default: 80)")
    parser.add_argument("--percentile", type=float, default=99.0, choices=(50.0, 90.0, 99.0), help="(default: 99)")
    parser.add_argument("--rows", type=Path, nargs="+", help="files of rows of bench serve")
    parser.add_argument("--case", help="which case of them (default: the only one)")
    parser.add_argument("--served", choices=(ENSEMBLE, FUSED), default=FUSED, help=f"(default: {FUSED})")
    parser.add_argument("--max-batch", type=count, default=32, help=f"users that {FUSED} joins (default: 32)")
    parser.add_argument("--per-gpu", type=positive, help="requests per second of one GPU, in place of rows")
    parser.add_argument("--table-rows", type=positive, default=1e9, help="of the item table (default: 1e9)")
    parser.add_argument("--row-bytes", type=positive, default=1024, help="(default: 1024, as of 512 x fp16)")
    parser.add_argument("--ids", type=positive, default=9048, help="lookups per request (default: 9048, DLRMv3's)")
    parser.add_argument(
        "--zipf", type=not_negative, default=1.05, help="of the ids' popularity (default: 1.05; 0: uniform)"
    )
    parser.add_argument("--headroom", type=float, default=0.3, help="share of each GPU kept free (default: 0.3)")
    parser.add_argument("--gpus-per-host", type=count, default=8, help="(default: 8)")
    parser.add_argument("--gpu-gib", type=not_negative, default=60.0, help="of a GPU's memory for rows (default: 60)")
    parser.add_argument("--host-gib", type=positive, default=1500.0, help="of a host's memory for rows (default: 1500)")
    parser.add_argument("--copies", type=count, default=2, help="of each row, where hosts share a table (default: 2)")
    parser.add_argument(
        "--gpu-hour", type=not_negative, help="price of a GPU for an hour (default: no cost is computed)"
    )
    parser.add_argument("--host-hour", type=not_negative, help="price of a host's rest for an hour")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    return parser


def _chosen_rows(paths: Sequence[Path], case: str | None) -> list[ResultRow]:
    rows = [row for row in read_rows(paths) if row.suite == SUITE]
    cases = sorted({row.case for row in rows})
    if case is None and len(cases) == 1:
        case = cases[0]
    if case not in cases:
        raise ConfigError(f"--case must be one of: {'; '.join(cases) or 'none: the files hold no rows of bench serve'}")
    return list(latest(row for row in rows if row.case == case).values())


def main(argv: Sequence[str]) -> int:
    """The verb."""
    args = _parser().parse_args(argv)
    bound = Bound(ms=args.slo_ms, percentile=args.percentile)
    facts: dict[str, Any] = {"checked": []}
    if (args.rows is None) == (args.per_gpu is None):
        raise ConfigError("give either --rows, measured by bench serve, or --per-gpu, an assumption")
    if args.per_gpu is not None:
        per_gpu, source = args.per_gpu, "ASSUMED, not measured: --per-gpu"
    else:
        rows = _chosen_rows(args.rows, args.case)
        model = model_of(rows, args.served, max_batch=args.max_batch)
        found = checked_predictions(rows, args.served, model)
        facts["checked"] = [
            {"run": row.variant, "measured": row.details["run"]["latency_ms"], "simulated": predicted}
            for row, predicted in found
        ]
        if not args.json:
            print(f"simulated queue against measured runs, ms\n{check_table(found)}\n")
        per_gpu, source = rate_of_one(rows, args.served, model, bound)
    demand, fleet = _demand(args), _fleet(args, per_gpu)
    plans = placements(demand, fleet)
    if args.json:
        print(json.dumps({**facts, "source": source, "plans": [asdict(plan) for plan in plans]}, indent=1))
        return 0
    print("\n".join([*assumptions(demand, fleet, bound, source), "", *(f"{p.name}: {p.text}" for p in plans)]))
    return 0


def _demand(args: argparse.Namespace) -> Demand:
    return Demand(
        per_s=args.rate,
        table_bytes=args.table_rows * args.row_bytes,
        ids_per_request=args.ids,
        row_bytes=args.row_bytes,
        zipf=args.zipf,
    )


def _fleet(args: argparse.Namespace, per_gpu: float) -> Fleet:
    return Fleet(
        per_gpu=per_gpu,
        headroom=args.headroom,
        gpus_per_host=args.gpus_per_host,
        gpu_gib=args.gpu_gib,
        host_gib=args.host_gib,
        copies=args.copies,
        gpu_hour=args.gpu_hour,
        host_hour=args.host_hour,
    )


def assumptions(demand: Demand, fleet: Fleet, bound: Bound, source: str) -> list[str]:
    """Everything that the plan rests on."""
    values = [
        ("demand", f"{demand.per_s:,.0f} requests/s, {bound.text}, {demand.ids_per_request:,.0f} lookups each"),
        ("table", f"{demand.table_bytes / GIB:,.0f} GiB in rows of {demand.row_bytes:,.0f} bytes"),
        ("popularity", f"Zipf {demand.zipf:g}" if demand.zipf else "uniform"),
        ("one GPU", f"{fleet.per_gpu:,.1f} requests/s ({source}), of which {1 - fleet.headroom:.0%} are planned with"),
        (
            "a host",
            f"{fleet.gpus_per_host} GPUs; rows take up to {fleet.gpu_gib:g} GiB of each, {fleet.host_gib:g} of it",
        ),
        (
            "cost",
            "not computed"
            if fleet.gpu_hour is None
            else f"{fleet.gpu_hour:g} per GPU and hour, {fleet.host_hour or 0:g} per host",
        ),
    ]
    return [text_table(("rests on", ""), values)]
