"""Panels as SVG. Colours, strokes and type come from the page's style sheet, so that light and dark are one drawing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import groupby

from dpkd.report.markup import Markup, element, joined
from dpkd.report.names import number
from dpkd.report.panels import Bar, BarPanel, Curve, LinePanel, Panel, ScatterPanel, Trail
from dpkd.report.scales import Scale, label, ticks, value_range

PALETTE = 8  # colours; more lines than that are dashed
WIDTH, HEIGHT = 400, 236
LEFT, RIGHT, TOP, BOTTOM = 44, 390, 10, 202
FEW_BARS = 9  # up to here each bar bears its value


def chart(panel: Panel) -> Markup:
    """The drawing of a panel."""
    if isinstance(panel, LinePanel):
        return _lines(panel)
    return _bars(panel) if isinstance(panel, BarPanel) else _scatter(panel)


def legend(panel: Panel) -> Markup | None:
    """Names and last values of the curves, names of the bars, or the scale of the colours."""
    if isinstance(panel, LinePanel):
        if len(panel.curves) == 1 and not panel.by_run:
            return element("div", element("span", "last ", element("b", number(panel.curves[0].last))), class_="legend")
        return _keys([(c.label, c.colour, number(c.last)) for c in panel.curves])
    if isinstance(panel, BarPanel):
        names = {bar.label: bar.colour for _, _, bars in panel.groups for bar in bars}
        return _keys([(name, colour, "") for name, colour in names.items()]) if len(names) > 1 else None
    values = [point.value for trail in panel.trails for point in trail.points]
    scale = element(
        "span",
        f"{panel.value_label} {label(round(min(values), 2))} ",
        element("i", class_="ramp"),
        f" {label(round(max(values), 2))}",
    )
    keys = _keys([(trail.label, trail.colour, "") for trail in panel.trails]) if len(panel.trails) > 1 else None
    return joined(element("div", scale, class_="legend"), keys)


def _keys(entries: Sequence[tuple[str, int, str]]) -> Markup:
    return element(
        "div",
        *(element("span", element("i", class_=_colour(c)), name, " ", element("b", last)) for name, c, last in entries),
        class_="legend",
    )


def _colour(index: int) -> str:
    return f"c{index % PALETTE}" + (" dashed" if index >= PALETTE else "")


def _svg(panel: Panel, *parts: str, **data: object) -> Markup:
    about = f"{panel.title}. {panel.note}" if panel.note else panel.title
    return element("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=about, class_="chart", **data)


def _text(x: float, y: float, content: str, class_: str) -> Markup:
    return element("text", content, x=_place(x), y=_place(y), class_=class_)


def _place(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _rule(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("line", x1=_place(x1), y1=_place(y1), x2=_place(x2), y2=_place(y2), class_=class_)


def _y_axis(scale: Scale) -> list[Markup]:
    parts = []
    for tick in ticks(scale.low, scale.high, 4):
        y = scale(tick)
        parts.append(_rule(LEFT, y, RIGHT, y, "zero" if tick == 0 else "grid"))
        parts.append(_text(LEFT - 6, y + 3.5, label(tick), "tick end"))
    return parts


def _x_axis(scale: Scale, name: str, whole: bool = False) -> list[Markup]:
    places = [tick for tick in ticks(scale.low, scale.high, 5) if not whole or tick == int(tick)]
    parts = [_rule(LEFT, BOTTOM, RIGHT, BOTTOM, "axis")]
    for tick in places:
        parts.append(_rule(scale(tick), BOTTOM, scale(tick), BOTTOM + 4, "axis"))
        parts.append(_text(scale(tick), BOTTOM + 15, label(tick), "tick middle"))
    return [*parts, _text((LEFT + RIGHT) / 2, HEIGHT - 5, name, "tick middle")]


def _lines(panel: LinePanel) -> Markup:
    steps = [step for curve in panel.curves for step in curve.steps]
    values = [value for curve in panel.curves for value in curve.values if value is not None]
    low, high = min(steps), max(steps)
    x = Scale(low, high if high > low else low + 1, LEFT, RIGHT)
    y = Scale(*(panel.limits or value_range(values)), BOTTOM, TOP)
    drawn = [part for curve in panel.curves for part in _curve(curve, x, y)]
    series = [
        {
            "label": c.label,
            "colour": _colour(c.colour),
            "steps": [round(s, 2) for s in c.steps],
            "values": [None if v is None else float(f"{v:.4g}") for v in c.values],
        }
        for c in panel.curves
    ]
    hover = {"x": [x.low, x.high, x.start, x.end], "y": [y.low, y.high, y.start, y.end], "series": series}
    return _svg(
        panel,
        *_y_axis(y),
        *_x_axis(x, "step", whole=True),
        *drawn,
        data_hover=json.dumps(hover, separators=(",", ":"), ensure_ascii=False),
    )


def _curve(curve: Curve, x: Callable[[float], float], y: Callable[[float], float]) -> list[Markup]:
    """A path for each stretch of finite values, and dots where they are asked for or a stretch is one point."""
    pairs = zip(curve.steps, curve.values, strict=True)
    parts = []
    for known, stretch in groupby(pairs, key=lambda pair: pair[1] is not None):
        if not known:
            continue
        places = [(x(step), y(value)) for step, value in stretch if value is not None]
        if len(places) > 1:
            path = "M" + "L".join(f"{_place(a)} {_place(b)}" for a, b in places)
            parts.append(element("path", d=path, class_=f"curve {_colour(curve.colour)}"))
        if curve.dots or len(places) == 1:
            parts += [_dot(a, b, 3, f"dot {_colour(curve.colour)}") for a, b in places]
    return parts


def _dot(x: float, y: float, radius: float, class_: str, *children: str, **more: object) -> Markup:
    return element("circle", *children, cx=_place(x), cy=_place(y), r=radius, class_=class_, **more)


def _bars(panel: BarPanel) -> Markup:
    tops = [bar.mean + (bar.sd or 0.0) for _, _, bars in panel.groups for bar in bars]
    y = Scale(*value_range([min(0.0, *tops), *tops], zero=True), BOTTOM - 12, TOP + 8)
    slot = (RIGHT - LEFT) / len(panel.groups)
    most = max(len(bars) for _, _, bars in panel.groups)
    width = min(46.0, 0.78 * slot / max(1, most))
    parts = _y_axis(y)
    for index, (name, about, bars) in enumerate(panel.groups):
        middle = LEFT + (index + 0.5) * slot
        parts += [
            _text(middle, BOTTOM + 4, name, "tick strong middle"),
            _text(middle, BOTTOM + 18, about, "tick middle"),
        ]
        for place, bar in enumerate(bars):
            left = middle + (place - len(bars) / 2) * width
            parts += _bar(bar, left, width, y, labelled=len(tops) <= FEW_BARS)
    return _svg(panel, *parts)


def _bar(bar: Bar, left: float, width: float, y: Scale, *, labelled: bool) -> list[Markup]:
    top, base, middle = y(bar.mean), y(0.0), left + width / 2
    told = f"{bar.label}: {number(bar.mean)}" + ("" if bar.sd is None else f" ± {number(bar.sd)}")
    parts = [
        element(
            "rect",
            element("title", told),
            x=_place(left + 1),
            y=_place(min(top, base)),
            width=_place(width - 2),
            height=_place(abs(base - top)),
            rx=2,
            class_=f"bar {_colour(bar.colour)}",
        )
    ]
    peak = top
    if bar.sd is not None:
        peak = y(bar.mean + bar.sd)
        parts.append(_rule(middle, y(max(0.0, bar.mean - bar.sd)), middle, peak, "whisker"))
    if labelled:
        parts.append(_text(middle, peak - 4, f"{bar.mean:.1f}", "tick middle"))
    return parts


def _scatter(panel: ScatterPanel) -> Markup:
    points = [point for trail in panel.trails for point in trail.points]
    x = Scale(*value_range([point.x for point in points]), LEFT, RIGHT)
    y = Scale(*value_range([point.y for point in points]), BOTTOM - 12, TOP + 12)
    low, high = min(p.value for p in points), max(p.value for p in points)
    parts = [*_y_axis(y), _text(LEFT - 38, TOP, panel.y_label, "tick start")]
    axis = _x_axis(x, panel.x_label)
    for trail in panel.trails:
        parts += _trail(trail, x, y, low, high)
    return _svg(panel, *axis, *parts)


def _trail(trail: Trail, x: Scale, y: Scale, low: float, high: float) -> list[Markup]:
    path = "M" + "L".join(f"{_place(x(p.x))} {_place(y(p.y))}" for p in trail.points)
    parts = [element("path", d=path, class_=f"curve faint {_colour(trail.colour)}")]
    for point in trail.points:
        share = (point.value - low) / (high - low) if high > low else 0.5
        told = f"{trail.label}, step {point.step}: Rouge-L {number(point.value)}, reward {number(point.y)}"
        parts.append(
            _dot(x(point.x), y(point.y), 5.5, "value", element("title", told), style=f"--t:{100 * share:.0f}%")
        )
    return parts
