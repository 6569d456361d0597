"""A small SVG writer: shapes with classes, a style sheet for light and dark, logarithmic scales."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape, quoteattr

# Each picture brings its own background, so that it is legible wherever it stands.
_LIGHT = {
    "ground": "#ffffff", "ink": "#1f2937", "soft": "#4b5563", "rule": "#e5e7eb", "axis": "#94a3b8",
    "a": "#1d4ed8", "b": "#0f766e", "c": "#c2410c", "n": "#6b7280",
}  # fmt: skip
_DARK = {
    "ground": "#0d1117", "ink": "#e6edf3", "soft": "#9da7b3", "rule": "#21262d", "axis": "#6e7681",
    "a": "#6ea8fe", "b": "#3fc7b5", "c": "#fb9a5b", "n": "#9da7b3",
}  # fmt: skip
_SHAPES = """
text { font: 12px ui-sans-serif, system-ui, sans-serif; }
.title { font-size: 15px; font-weight: 600; } .small { font-size: 10.5px; }
.line { fill: none; stroke-width: 2; } .axis { fill: none; } .thin { stroke-width: 0.8; }
.dashed { stroke-dasharray: 6 4; } .dotted { stroke-dasharray: 2 3; } .faint { fill-opacity: 0.5; }
"""


def _colours(palette: Mapping[str, str]) -> str:
    """Rules of a palette. Classes a, b, c colour series, n what is neutral."""
    rules = [
        f"text {{ fill: {palette['soft']}; }}",
        f".title {{ fill: {palette['ink']}; }}",
        f".ground {{ fill: {palette['ground']}; }}",
        f".rule {{ stroke: {palette['rule']}; }}",
        f".axis {{ stroke: {palette['axis']}; }}",
    ]
    for name in "abcn":
        rules.append(f".line.{name}, .axis.{name} {{ stroke: {palette[name]}; }}")
        rules.append(f".dot.{name}, text.{name} {{ fill: {palette[name]}; }}")
    return "\n".join(rules)


_STYLE = f"{_SHAPES}{_colours(_LIGHT)}\n@media (prefers-color-scheme: dark) {{\n{_colours(_DARK)}\n}}"


@dataclass(frozen=True)
class LogScale:
    """Values to pixels, logarithmically."""

    values: tuple[float, float]
    pixels: tuple[float, float]

    def __call__(self, value: float) -> float:
        (low, high), (first, last) = self.values, self.pixels
        return first + (last - first) * math.log(value / low) / math.log(high / low)


@dataclass(frozen=True)
class LinearScale:
    """Values to pixels."""

    values: tuple[float, float]
    pixels: tuple[float, float]

    def __call__(self, value: float) -> float:
        (low, high), (first, last) = self.values, self.pixels
        return first + (last - first) * (value - low) / (high - low)


Point = tuple[float, float]


@dataclass
class Picture:
    """An SVG file that is being drawn."""

    width: int
    height: int
    label: str
    """What a screen reader says."""
    _elements: list[str] = field(default_factory=list)

    def text(self, at: Point, content: str, style: str = "", anchor: str = "start") -> None:
        """A line of text; ``anchor``: start, middle or end."""
        x, y = at
        attributes = f'class={quoteattr(style)} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self._elements.append(f"<text {attributes}>{escape(content)}</text>")

    def line(self, points: Sequence[Point], style: str) -> None:
        """A line through points."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._elements.append(f'<polyline class={quoteattr(style)} points="{path}"/>')

    def dot(self, at: Point, style: str, shape: str = "circle", radius: float = 3.6) -> None:
        """A mark: circle (of that radius), square or diamond."""
        x, y = at
        if shape == "circle":
            self._elements.append(
                f'<circle class={quoteattr("dot " + style)} cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"/>'
            )
            return
        turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if shape == "diamond" else ""
        box = f'x="{x - 3.2:.1f}" y="{y - 3.2:.1f}" width="6.4" height="6.4"{turn}'
        self._elements.append(f"<rect class={quoteattr('dot ' + style)} {box}/>")

    def bar(self, corner: Point, size: Point, style: str) -> None:
        """A filled rectangle; ``corner`` is its upper left one, ``size`` its width and height."""
        (x, y), (width, height) = corner, size
        box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
        self._elements.append(f"<rect class={quoteattr('dot ' + style)} {box}/>")

    def render(self) -> str:
        """The file's text."""
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label={quoteattr(self.label)}>'
        ground = f'<rect class="ground" width="{self.width}" height="{self.height}" rx="6"/>'
        return "\n".join([head, f"<style>{_STYLE}\n</style>", ground, *self._elements, "</svg>"]) + "\n"


def spread_apart(positions: Sequence[float], gap: float) -> list[float]:
    """Positions moved as little as keeps them ``gap`` apart, in their order; for labels of near points."""
    order = sorted(range(len(positions)), key=lambda n: positions[n])
    # Runs of labels that touch stand centred on the mean of their points.
    runs: list[list[int]] = []
    for n in order:
        runs.append([n])
        while len(runs) > 1 and _begin(runs[-1], positions, gap) < _end(runs[-2], positions, gap) + gap:
            last = runs.pop()
            runs[-1] += last
    moved = list(positions)
    for run in runs:
        for number, n in enumerate(run):
            moved[n] = _begin(run, positions, gap) + number * gap
    return moved


def _begin(run: Sequence[int], positions: Sequence[float], gap: float) -> float:
    return sum(positions[n] for n in run) / len(run) - gap * (len(run) - 1) / 2


def _end(run: Sequence[int], positions: Sequence[float], gap: float) -> float:
    return _begin(run, positions, gap) + gap * (len(run) - 1)
