"""What each kernel takes on the device, from what ptxas said when it was compiled, and what must not be."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hstu_trt.contract.text import text_table

# Kernels of these sources have registers to the last for their accumulators: a spill in their loops costs a multiple.
SPILL_FREE = "sm90_"

_ENTRY = re.compile(r"Compiling entry function '(?P<symbol>[^']+)' for '(?P<arch>sm_\w+)'")
_PROPERTIES = re.compile(r"Function properties for (?P<symbol>\S+)")
_STACK = re.compile(r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill")
_USED = re.compile(r"Used (?P<registers>\d+) registers(?:.*?, (?P<shared>\d+)(?:\+\d+)? bytes smem)?")
# (C7510) wgmma serialised, (C7508) setmaxnreg ignored, ...: numbered notes are about performance lost.
_NOTE = re.compile(r"ptxas \w+\s*: (?P<text>\(C\d+\).*)")

_ELEMENTS = {"__half": "fp16", "__nv_bfloat16": "bf16", "__nv_fp8_e4m3": "fp8"}


@dataclass(frozen=True)
class KernelResources:
    """One compiled kernel."""

    source: str
    """File name of its source."""
    name: str
    arch: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int
    """Bytes of shared memory that the kernel declares; a launch may ask for more."""

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads


@dataclass(frozen=True)
class Note:
    """A numbered remark of ptxas."""

    source: str
    text: str


def read_logs(folder: Path) -> tuple[list[KernelResources], list[Note]]:
    """All ``*.o.log`` files that ``log_ptxas.sh`` left beside an object below a build folder."""
    kernels: list[KernelResources] = []
    notes: list[Note] = []
    for log in sorted(folder.rglob("*.o.log")):
        if not log.with_suffix("").is_file():
            continue
        found = parse_log(log.name.removesuffix(".o.log"), log.read_text(errors="replace"))
        kernels += found[0]
        notes += found[1]
    return kernels, notes


def parse_log(source: str, text: str) -> tuple[list[KernelResources], list[Note]]:
    """What ``ptxas -v`` says, as kernels and notes. Functions that are called, not launched, are left out."""
    kernels, notes = [], []
    arch, symbol, about = "", "", ""
    stack: dict[str, re.Match[str]] = {}
    for line in text.splitlines():
        if entry := _ENTRY.search(line):
            symbol, arch = entry["symbol"], entry["arch"]
        elif properties := _PROPERTIES.search(line):
            about = properties["symbol"]
        elif frame := _STACK.search(line):
            stack[about] = frame
        elif (used := _USED.search(line)) and symbol in stack:
            frame = stack.pop(symbol)
            stores, loads, size = (int(frame[key]) for key in ("stores", "loads", "stack"))
            registers, shared = int(used["registers"]), int(used["shared"] or 0)
            kernels.append(KernelResources(source, symbol, arch, registers, stores, loads, size, shared))
        elif note := _NOTE.search(line):
            notes.append(Note(source, note["text"]))
    return kernels, list(dict.fromkeys(notes))


def faults(kernels: Iterable[KernelResources], notes: Iterable[Note]) -> list[str]:
    """Sentences about what must not be: spills and lost performance in the sm90 kernels."""
    spills = [
        f"{kernel.source}: {kernel.name} spills {kernel.spill_stores} bytes to memory and loads {kernel.spill_loads}"
        for kernel in kernels
        if kernel.source.startswith(SPILL_FREE) and kernel.spills
    ]
    return spills + [f"{note.source}: {note.text}" for note in notes if note.source.startswith(SPILL_FREE)]


def table(kernels: Sequence[KernelResources]) -> str:
    """The kernels as a text table."""
    header = ("kernel", "GPU", "registers", "spill stores", "spill loads", "stack", "static smem")
    rows = [(k.name, k.arch, k.registers, k.spill_stores, k.spill_loads, k.stack, k.shared) for k in kernels]
    return text_table(header, rows)


def demangle(symbols: Sequence[str]) -> list[str]:
    """Short names of C++ symbols: without our namespaces, argument lists and casts. Needs c++filt, else as they are."""
    tool = shutil.which("c++filt")
    if tool is None or not symbols:
        return list(symbols)
    shown = subprocess.run([tool], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    return [short_name(line) for line in shown.splitlines()]


def short_name(signature: str) -> str:
    """``void hstu_trt::f<(int)64, __half>(Params)`` -> ``f<64, fp16>``."""
    text = signature.removeprefix("void ").replace("(anonymous namespace)::", "").replace("> >", ">>")
    text = re.sub(r"\bhstu_trt::", "", re.sub(r"\((?:unsigned )?\w+(?:::\w+)*\)(?=-?\d)", "", text))
    text = re.sub(r"\b(?:__half|__nv_bfloat16|__nv_fp8_e4m3)\b", lambda name: _ELEMENTS[name[0]], text)
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return text[:at]
    return text
