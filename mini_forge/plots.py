"""Line charts as SVG, for pages that need no script and no other file. Colours follow the page's, light or dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 10, 40  # margins around the plot
COLOURS = ("#3273c8", "#d9622b", "#2f9e58", "#a04fc0", "#c8a11a", "#19a0a8", "#d0487e", "#7d7d7d")  # then again
MOST_POINTS = 400  # of a line; of more, as many means
TICKS = 5  # at least so many intervals are aimed at


@dataclass(frozen=True)
class Line:
    """points: (x, y) by rising x, at least one. colour: its place in COLOURS. A dashed line shows its points."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    is_dashed: bool = False


def ticks(low: float, high: float) -> list[float]:
    """Numbers 1, 2 or 5 · 10ⁿ apart, four to eight of them: the first not above `low`, the last not below `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # a level line, but for rounding
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def number(value: float) -> str:
    """In at most four digits, or as a power of ten where that is shorter."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    digits, _, power = f"{value:.3e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS: the means of as many runs of neighbours."""
    if len(points) <= MOST_POINTS:
        return list(points)
    edges = [len(points) * i // MOST_POINTS for i in range(MOST_POINTS + 1)]
    parts = [points[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def chart(lines: Sequence[Line], x_name: str) -> str:
    """An SVG element of the lines over one pair of axes."""
    lines = [Line(line.name, thinned(line.points), line.colour, line.is_dashed) for line in lines]
    xs, ys = ([point[i] for line in lines for point in line.points] for i in (0, 1))
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))

    across = (WIDTH - LEFT - RIGHT) / (x_ticks[-1] - x_ticks[0])
    up = (HEIGHT - TOP - BOTTOM) / (y_ticks[-1] - y_ticks[0])

    def place(x: float, y: float) -> tuple[str, str]:
        return f"{LEFT + (x - x_ticks[0]) * across:.1f}", f"{HEIGHT - BOTTOM - (y - y_ticks[0]) * up:.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" xmlns="http://www.w3.org/2000/svg" role="img">']
    for y in y_ticks:
        at = place(x_ticks[0], y)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at}" dy="0.32em" text-anchor="end">{number(y)}</text>')
    for x in x_ticks:
        at = place(x, y_ticks[0])[0]
        parts.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{number(x)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_name)}</text>')
    for line in lines:
        parts += _drawn(line, [place(*point) for point in line.points])
    return "\n".join([*parts, "</svg>"])


def _drawn(line: Line, places: list[tuple[str, str]]) -> list[str]:
    """A line, and a spot that tells its numbers for each point that is to be seen."""
    colour, name = COLOURS[line.colour % len(COLOURS)], escape(line.name)
    dashes = ' stroke-dasharray="5 4"' if line.is_dashed else ""
    parts = [f'<polyline fill="none" stroke="{colour}" stroke-width="1.6"{dashes} points="'
             + " ".join(f"{x},{y}" for x, y in places) + f'"><title>{name}</title></polyline>']  # fmt: skip
    if line.is_dashed or len(places) == 1:
        for (x, y), (step, value) in zip(places, line.points, strict=True):
            told = f"<title>{name}: {number(value)} at {number(step)}</title>"
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}">{told}</circle>')
    return parts
