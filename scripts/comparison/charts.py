"""Line charts as SVG text, with nothing to load: measured curves thin, their mean thick, names at the side."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from scripts.comparison.arithmetic import Curve

WIDTH, HEIGHT = 900, 380
LEFT, RIGHT, TOP, BOTTOM = 62, 250, 16, 46
# Okabe and Ito's colours, told apart with every kind of colour blindness; after eight, dashes tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a6d00")
DASHES = ("", "7 4", "2 3")


@dataclass(frozen=True, slots=True)
class Series:
    """One line with its name; `single`: the curves it is the mean of. `number` picks its colour."""

    name: str
    number: int
    mean: Curve
    single: Sequence[Curve] = ()


@dataclass(frozen=True, slots=True)
class Axis:
    """`percent`: shares in 0..1 are written as percentages."""

    label: str
    percent: bool = False

    def write(self, value: float) -> str:
        if self.percent:
            return f"{value * 100:.4g}%"
        for size, unit in ((1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:.4g}{unit}"
        return f"{value:.4g}"


def line_chart(series: Sequence[Series], x: Axis, y: Axis) -> str:
    """Return the chart as an `<svg>` element that stands alone. ValueError without any series."""
    if not series:
        raise ValueError("nothing to draw")
    all_curves = [curve for line in series for curve in (line.mean, *line.single)]
    x_ticks = ticks(min(c.cost[0] for c in all_curves), max(c.cost[-1] for c in all_curves))
    y_ticks = ticks(min(c.value.min() for c in all_curves), max(c.value.max() for c in all_curves))
    place = _Place(x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1])
    parts = [*_frame(place, x_ticks, y_ticks, x, y)]
    for line in series:
        colour = COLOURS[line.number % len(COLOURS)]
        dash = DASHES[line.number // len(COLOURS) % len(DASHES)]
        style = f' stroke-dasharray="{dash}"' if dash else ""
        parts += [
            f'<path d="{place.path(c)}" fill="none" stroke="{colour}" stroke-width="1" opacity="0.3"{style}/>'
            for c in line.single
        ]
        parts.append(
            f'<path d="{place.path(line.mean)}" fill="none" stroke="{colour}" stroke-width="2.5"{style}>'
            f"<title>{escape(line.name)}</title></path>"
        )
        parts += [
            f'<circle cx="{place.x(cx):.1f}" cy="{place.y(cy):.1f}" r="3" fill="{colour}"/>'
            for cx, cy in ([(line.mean.cost[0], line.mean.value[0])] if len(line.mean.cost) == 1 else [])
        ]
    parts += _names(series, place, y)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" '
        f'fill="#fff"/>{"".join(parts)}</svg>'
    )


def ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that enclose `low` and `high`, about `wanted` of them."""
    if not high > low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * size for size in (1, 2, 5, 10) if power * size >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(np.round(index * step, 12)) for index in range(first, last + 1)]


@dataclass(frozen=True, slots=True)
class _Place:
    """Data to pixels."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def path(self, curve: Curve) -> str:
        points = [f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in zip(curve.cost, curve.value, strict=True)]
        return "M" + "L".join(points)


def _frame(place: _Place, x_ticks: Sequence[float], y_ticks: Sequence[float], x: Axis, y: Axis) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick in y_ticks:
        at = place.y(tick)
        parts.append(f'<path d="M{LEFT} {at:.1f}H{right}" stroke="#e3e6eb"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end" fill="#555">{y.write(tick)}</text>')
    for tick in x_ticks:
        at = place.x(tick)
        parts.append(f'<path d="M{at:.1f} {bottom}v5" stroke="#888"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 19}" text-anchor="middle" fill="#555">{x.write(tick)}</text>')
    middle_x, middle_y = (LEFT + right) / 2, (TOP + bottom) / 2
    parts += [
        f'<path d="M{LEFT} {bottom}H{right}" stroke="#888"/>',
        f'<text x="{middle_x}" y="{HEIGHT - 8}" text-anchor="middle" fill="#222">{escape(x.label)}</text>',
        f'<text transform="translate(14 {middle_y}) rotate(-90)" text-anchor="middle" fill="#222">'
        f"{escape(y.label)}</text>",
    ]
    return parts


def _names(series: Sequence[Series], place: _Place, y: Axis) -> list[str]:
    """Return each line's name and last value beside its end, moved apart where they would overlap."""
    order = sorted(series, key=lambda line: -line.mean.value[-1])
    gap = min(16.0, (HEIGHT - TOP - BOTTOM) / len(order))
    heights = [place.y(float(line.mean.value[-1])) for line in order]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    limit = float(HEIGHT - BOTTOM)
    for i in range(len(heights) - 1, -1, -1):
        heights[i] = min(heights[i], limit)
        limit = heights[i] - gap
    parts = []
    for line, at in zip(order, heights, strict=True):
        colour = COLOURS[line.number % len(COLOURS)]
        dash = DASHES[line.number // len(COLOURS) % len(DASHES)]
        style = f' stroke-dasharray="{dash}"' if dash else ""
        end_x, end_y = place.x(float(line.mean.cost[-1])), place.y(float(line.mean.value[-1]))
        side = WIDTH - RIGHT + 8
        parts += [
            f'<path d="M{end_x:.1f} {end_y:.1f}L{side} {at:.1f}" stroke="{colour}" opacity="0.35"/>',
            f'<path d="M{side} {at:.1f}h18" stroke="{colour}" stroke-width="2.5"{style}/>',
            f'<text x="{side + 23}" y="{at + 4:.1f}" fill="#222">{escape(line.name)} '
            f'<tspan fill="#666">{y.write(float(f"{line.mean.value[-1]:.3g}"))}</tspan></text>',
        ]
    return parts
