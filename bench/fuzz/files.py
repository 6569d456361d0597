"""Findings as files: the request that was sent, and what came back."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from hstu_trt.bench.fuzz.cases import Case
from hstu_trt.bench.fuzz.verdict import Finding
from hstu_trt.contract.errors import InputError


def write_finding(folder: Path, seed: int, found: Finding) -> Path:
    """Writes a finding and returns its file."""
    folder.mkdir(parents=True, exist_ok=True)
    case = found.case
    document = {
        "seed": seed,
        "number": case.number,
        "kind": case.kind,
        "what": found.what,
        "answer": {"code": found.outcome.code, "details": found.outcome.details, "seconds": found.outcome.seconds},
        "method": case.method,
        "metadata": case.metadata,
        "gzip": case.gzip,
        "body": base64.b64encode(case.body).decode(),
    }
    path = folder / f"{seed}_{case.number}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def read_case(path: Path) -> tuple[int, Case]:
    """Seed and case of such a file. Raises InputError."""
    try:
        document = json.loads(path.read_text())
        case = Case(
            number=int(document["number"]),
            kind=str(document["kind"]),
            method=str(document["method"]),
            body=base64.b64decode(document["body"], validate=True),
            metadata=tuple((str(name), str(value)) for name, value in document["metadata"]),
            gzip=bool(document["gzip"]),
        )
        return int(document["seed"]), case
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no finding of the fuzzer: {error!r}") from None
