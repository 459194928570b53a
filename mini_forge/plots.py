"""Line charts as SVG, for pages that need no script and no other file. Text and grid have the page's colour."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 76, 14, 10, 40  # margins around the plot
COLOURS = ("#3273c8", "#d9622b", "#2f9e58", "#a04fc0", "#c8a11a", "#19a0a8", "#d0487e", "#7d7d7d")  # then again
MOST_POINTS = 400  # of a line; of more, as many means
INTERVALS = 5  # of an axis, at most, but for what lies between round ends
LARGEST = 1e300  # numbers beyond are not drawn: their differences would be infinite


@dataclass(frozen=True)
class Line:
    """points: (x, y) by rising x, at least one, within ± LARGEST. colour: its place in COLOURS. A dashed line shows its
    points."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    is_dashed: bool = False


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Numbers 1, 2 or 5 · 10ⁿ apart, at most eight: the first not above `low`, the last not below `high`. whole: they
    are whole numbers."""
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-300):  # a level line, but for rounding
        around = 1.0 if whole else abs(low) / 2 if abs(low) > 1e-290 else 0.5
        low, high = low - around, high + around
    rough = (high - low) / INTERVALS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """As many digits as tell them apart, which lie equally far from each other."""
    step, largest = values[1] - values[0], max(map(abs, values))
    if 1e-3 <= largest < 1e6:
        decimals = max(0, -math.floor(math.log10(step) + 1e-6))
        return [f"{value if abs(value) > step / 2 else 0:,.{decimals}f}" for value in values]
    digits = max(0, math.ceil(math.log10(largest / step) - 1e-6))
    return [_power(f"{value:.{digits}e}") if abs(value) > step / 2 else "0" for value in values]


def number(value: float, digits: int = 4) -> str:
    """Rounded to so many digits; from 10,000 on to a whole number, and very large and small ones as powers of ten."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 9999.5:
        return f"{value:.{digits}g}"
    if 9999.5 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return _power(f"{value:.{digits - 1}e}")


def _power(text: str) -> str:
    """1.500e-04 → 1.5e-4"""
    mantissa, _, power = text.partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(power)}"


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS: the means of as many runs of neighbours."""
    if len(points) <= MOST_POINTS:
        return list(points)
    edges = [len(points) * i // MOST_POINTS for i in range(MOST_POINTS + 1)]
    parts = [points[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    return [(sum(x for x, _ in part) / len(part), sum(y / len(part) for _, y in part)) for part in parts]


def chart(lines: Sequence[Line], x_name: str) -> str:
    """An SVG element of the lines over one pair of axes; x are whole numbers."""
    lines = [Line(line.name, thinned(line.points), line.colour, line.is_dashed) for line in lines]
    xs, ys = ([point[i] for line in lines for point in line.points] for i in (0, 1))
    x_ticks, y_ticks = ticks(min(xs), max(xs), whole=True), ticks(min(ys), max(ys))
    across = (WIDTH - LEFT - RIGHT) / (x_ticks[-1] - x_ticks[0])
    up = (HEIGHT - TOP - BOTTOM) / (y_ticks[-1] - y_ticks[0])

    def place(x: float, y: float) -> tuple[str, str]:
        return f"{LEFT + (x - x_ticks[0]) * across:.1f}", f"{HEIGHT - BOTTOM - (y - y_ticks[0]) * up:.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" xmlns="http://www.w3.org/2000/svg" role="img">']
    for y, label in zip(y_ticks, tick_labels(y_ticks), strict=True):
        at = place(x_ticks[0], y)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at}" dy="0.32em" text-anchor="end">{label}</text>')
    for x, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        at = place(x, y_ticks[0])[0]
        parts.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_name)}</text>')
    for line in lines:
        parts += _drawn(line, [place(*point) for point in line.points])
    return "\n".join([*parts, "</svg>"])


def _drawn(line: Line, places: list[tuple[str, str]]) -> list[str]:
    """A line, and a spot that tells its numbers for each point that is to be seen."""
    colour, name = COLOURS[line.colour % len(COLOURS)], escape(line.name)
    dashes = ' stroke-dasharray="5 4"' if line.is_dashed else ""
    points = " ".join(f"{x},{y}" for x, y in places)
    parts = [
        f'<polyline fill="none" stroke="{colour}" stroke-width="1.6"{dashes} points="{points}">'
        f"<title>{name}</title></polyline>"
    ]
    if line.is_dashed or len(places) == 1:
        for (x, y), (step, value) in zip(places, line.points, strict=True):
            told = f"<title>{name}: {number(value, 6)} at {number(step)}</title>"
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}">{told}</circle>')
    return parts
