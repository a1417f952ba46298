"""Figures that are readable in grey and by the colour-blind: one way to draw bars and lines, with 95 % intervals.

Series differ in lightness, and besides in hatch (bars) or marker and dash (lines). A method looks the same everywhere.
A point is a number, a dict {"value" or "share", "low", "high"}, or None where it was not measured ("n/a" in a figure).
In a notebook, `%matplotlib inline` shows a returned figure.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Point = float | Mapping[str, Any] | None
# Series → place on the axis → point.
Series = Mapping[str, Mapping[Any, Point]]

INK, RULE = "#222222", "#d9d9d9"
SETTINGS = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "xtick.labelsize": 10,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.axisbelow": True,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "figures",
}
WIDTH, HEIGHT = 7.2, 3.2
MARK: dict[str, Any] = {
    "marker": "D",
    "color": "white",
    "markeredgecolor": INK,
    "markersize": 6,
    "linestyle": "",
    "zorder": 4,
}
# Lines with intervals stand this much of the axis apart.
SHIFT = 0.008
# The bars of one place take this much of the room up to the next.
FILLED = 0.84


@dataclass(frozen=True)
class Look:
    """How a series is drawn. `line`: its colour as a line, where the bar's is too light for one."""

    colour: str
    hatch: str
    marker: str
    dash: Any
    line: str


# From light to dark; blue and orange stay apart for every kind of colour-blindness.
LOOKS = (
    Look("#ededed", "", "o", ":", "#8c8c8c"),
    Look("#f6cf7d", "////", "s", "--", "#c98a1b"),
    Look("#7fb5d9", "----", "^", "-.", "#5a9cc5"),
    Look("#c96f40", "\\\\\\\\", "v", (0, (6, 2)), "#bf5f2d"),
    Look("#2a6390", "", "D", "-", "#2a6390"),
    Look("#14304f", "", "P", (0, (4, 1, 1, 1, 1, 1)), "#14304f"),
    Look("#b5b5b5", "xxxx", "X", (0, (1, 1)), "#6b6b6b"),
    Look("#6b6b6b", "++", "*", (0, (3, 1)), "#444444"),
)
METHODS = {"base": 0, "prompted": 1, "steered": 2, "distilled": 3, "merged": 4, "sequential": 5}
# The order in which other series take what the methods beside them leave.
OTHERS = (4, 1, 5, 0, 3, 2, 6, 7)


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A look per series: a method's own, and for other names those that are left, in order, again and again."""
    names = list(names)
    taken = {METHODS[name] for name in names if name in METHODS}
    free = [number for number in OTHERS if number not in taken] or OTHERS
    others = [name for name in names if name not in METHODS]
    found = {name: LOOKS[free[place % len(free)]] for place, name in enumerate(others)}
    return {name: LOOKS[METHODS[name]] if name in METHODS else found[name] for name in names}


def value_of(point: Point) -> float | None:
    """The number of a point; None where it was not measured."""
    if isinstance(point, Mapping):
        found: float | None = point["share"] if "share" in point else point["value"]
        return found
    return point


def error_of(point: Point) -> tuple[float, float]:
    """How far the interval reaches below and above the point; zeros where it has none."""
    if not isinstance(point, Mapping) or point.get("low") is None or point.get("high") is None:
        return 0.0, 0.0
    value = value_of(point) or 0.0
    # Rounding may leave an end on the point's wrong side.
    return max(0.0, value - point["low"]), max(0.0, point["high"] - value)


def bars(
    series: Series,
    label: str,
    *,
    labels: Mapping[str, str] | None = None,
    title: str = "",
    limits: tuple[float, float] | None = None,
    percent: bool = False,
    reference: float | None = None,
    marks: Series | None = None,
    mark_label: str = "",
    horizontal: bool = False,
) -> Any:
    """A matplotlib figure of grouped bars, one group per place, one bar per series, with intervals.

    label: of the value axis. labels: series → its name in the legend. limits: of the value axis. percent: its ticks.
    reference: a value that gets a dashed line. marks: diamonds over the bars, such as published figures, called
    mark_label in the legend. horizontal: places from top to bottom, for many of them or long names.
    """
    places = list(dict.fromkeys(place for points in series.values() for place in points))
    height = max(HEIGHT, 0.9 + 0.26 * len(places) * (1 + 0.4 * (len(series) - 1))) if horizontal else HEIGHT
    figure, axes = _figure(title, height)
    thickness = FILLED / max(1, len(series))
    marked = False
    for number, (name, look) in enumerate(looks(series).items()):
        positions = [place + (number + 0.5) * thickness - FILLED / 2 for place in range(len(places))]
        points = [series[name].get(place) for place in places]
        _bar(axes, positions, points, thickness, look, (labels or {}).get(name, name), horizontal)
        for position, place in zip(positions, places, strict=True):
            mark = value_of((marks or {}).get(name, {}).get(place))
            if mark is not None:
                spot = (mark, position) if horizontal else (position, mark)
                axes.plot(*spot, label=mark_label if not marked else "", **MARK)
                marked = True
    value_axis, place_axis = (axes.xaxis, axes.yaxis) if horizontal else (axes.yaxis, axes.xaxis)
    place_axis.set_ticks(range(len(places)), [str(place) for place in places])
    place_axis.set_tick_params(length=0)
    if horizontal:
        axes.invert_yaxis()
    _finish(figure, axes, value_axis, label, limits, percent, reference, len(series) > 1 or marked)
    return figure


def _bar(
    axes: Any, positions: list[float], points: list[Point], thickness: float, look: Look, name: str, horizontal: bool
) -> None:
    """One series of bars with its intervals, and "n/a" where a point was not measured."""
    from matplotlib.patheffects import withStroke

    draw, error = (axes.barh, "xerr") if horizontal else (axes.bar, "yerr")
    values = [value_of(point) for point in points]
    draw(
        positions,
        [0.0 if value is None else value for value in values],
        0.92 * thickness,
        label=name,
        color=look.colour,
        edgecolor=INK,
        linewidth=0.7,
        hatch=look.hatch,
        **{error: [list(side) for side in zip(*map(error_of, points), strict=True)] if points else None},
        error_kw={"ecolor": INK, "elinewidth": 1.1, "capsize": 2.5, "clip_on": False},
    )
    # A dark interval must be seen on a dark bar too.
    interval = axes.containers[-1].errorbar
    for part in interval.lines[1:] if interval else ():
        for artist in part:
            artist.set_path_effects([withStroke(linewidth=2.6, foreground="white")])
    for position, value in zip(positions, values, strict=True):
        if value is None:
            spot = (0.0, position) if horizontal else (position, 0.0)
            axes.annotate(
                "n/a", spot, xytext=(3, 0) if horizontal else (0, 3), textcoords="offset points", fontsize=8,
                ha="left" if horizontal else "center", va="center" if horizontal else "bottom",
            )  # fmt: skip


def lines(
    series: Series,
    place_label: str,
    label: str,
    *,
    labels: Mapping[str, str] | None = None,
    title: str = "",
    limits: tuple[float, float] | None = None,
    percent: bool = False,
    reference: float | None = None,
) -> Any:
    """A matplotlib figure of one line per series over numbers, with intervals where points have them.

    place_label, label: of the horizontal and the value axis. The others as for `bars`. A point that was not measured
    leaves a gap.
    """
    figure, axes = _figure(title, HEIGHT)
    every = [place for points in series.values() for place in points]
    width = max(every, default=0) - min(every, default=0)
    for number, (name, look) in enumerate(looks(series).items()):
        places = list(series[name])
        points = list(series[name].values())
        values = [float("nan") if value is None else value for value in map(value_of, points)]
        errors = [list(side) for side in zip(*map(error_of, points), strict=True)]
        # Intervals at one place stand beside each other.
        shift = SHIFT * width * (number - (len(series) - 1) / 2) if any(map(any, errors)) else 0
        axes.errorbar(
            [place + shift for place in places],
            values,
            yerr=errors if any(map(any, errors)) else None,
            label=(labels or {}).get(name, name),
            color=look.line,
            linestyle=look.dash,
            linewidth=1.6,
            marker=look.marker,
            markersize=5,
            # Markers on a long line would hide it.
            markevery=max(1, len(places) // 10),
            capsize=2.5,
            elinewidth=1.1,
            clip_on=False,
        )
    axes.set_xlabel(place_label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _finish(figure, axes, axes.yaxis, label, limits, percent, reference, len(series) > 1)
    return figure


def _figure(title: str, height: float) -> tuple[Any, Any]:
    """An empty figure with one pair of axes. It belongs to no window, so that nothing has to be closed."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, loc="left")
    return figure, axes


def _finish(
    figure: Any,
    axes: Any,
    value_axis: Any,
    label: str,
    limits: tuple[float, float] | None,
    percent: bool,
    reference: float | None,
    legend: bool,
) -> None:
    """The value axis, the reference line, and the legend below the axes, where it hides nothing."""
    import matplotlib
    from matplotlib.lines import Line2D
    from matplotlib.ticker import PercentFormatter

    value_axis.set_label_text(label)
    value_axis.grid(color=RULE, linewidth=0.6)
    horizontal = value_axis is axes.xaxis
    if limits:
        # A little more room, for a point at the upper limit.
        room = 0.03 * (limits[1] - limits[0])
        (axes.set_xlim if horizontal else axes.set_ylim)(limits[0], limits[1] + room)
    if percent:
        value_axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if reference is not None:
        (axes.axvline if horizontal else axes.axhline)(reference, color=INK, linewidth=0.9, linestyle=(0, (5, 4)))
    if legend:
        found = list(zip(*axes.get_legend_handles_labels(), strict=True))
        found.sort(key=lambda entry: isinstance(entry[0], Line2D))
        with matplotlib.rc_context(SETTINGS):
            figure.legend(*zip(*found, strict=True), loc="outside lower center", ncols=3)
