"""Why a server did not start or died, in a few lines of its log."""

from __future__ import annotations

import re
from pathlib import Path

MOST_LINES = 6
_PREFIX = re.compile(r"^[EFW]\d{4} [\d:.]+ \d+ \S+\] ?")
_FAILED_MODEL = re.compile(r"failed to load '(?P<model>[^']+)'(?: version \d+)?: (?P<cause>.*)")
# What the Python backend puts around the message of an exception; its line breaks come escaped.
_WRAPPING = re.compile(r"^Internal: (?:TritonModelException: )?|\\n\\nAt:\\n.*$")
# What no logger wrote, such as "Segmentation fault": neither a log line nor a row of Triton's tables.
_PLAIN = re.compile(r"(?![EFIW]\d{4} |[+|]|\s*$)")
# Follow-ups of a failed start that name no cause.
_NOISE = (
    "CudaDriverHelper",
    "NVML",
    "pinned system memory",
    "failed to load all models",
    "DCGM",
    "CUDA driver version",
)


def cause_of_failure(log: Path) -> list[str]:
    """At most ``MOST_LINES`` lines: each failed model with its error, else the last errors, else what is no log."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return []
    failed: dict[str, str] = {}
    errors: list[str] = []
    for line in lines:
        if not re.match(r"^[EF]\d{4} |^error:", line) or any(word in line for word in _NOISE):
            continue
        text = _PREFIX.sub("", line).strip().strip('"')
        match = _FAILED_MODEL.search(text)
        if match:
            failed.setdefault(match["model"], _WRAPPING.sub("", match["cause"]))
        errors.append(text)
    found = [f"model {model!r}: {cause}" for model, cause in failed.items()]
    return (found or errors or [line for line in lines if _PLAIN.match(line)])[-MOST_LINES:]
