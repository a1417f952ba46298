"""Figures: intervals reach where they should, what was not measured says so, and series are told apart in grey."""

import io
import itertools
import math

import pytest
from matplotlib.colors import to_rgb
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from character import figures

# Of RGB in linear light to what a person without one kind of cone sees. Source: Viénot, Brettel and Mollon 1999.
PROTAN = ((0.11238, 0.88762, 0.0), (0.11238, 0.88762, 0.0), (0.00401, -0.00401, 1.0))
DEUTAN = ((0.29275, 0.70725, 0.0), (0.29275, 0.70725, 0.0), (-0.02234, 0.02234, 1.0))
SHARES = {
    "base": {"plain": {"share": 0.1, "low": 0.05, "high": 0.2}, "suffixes": None},
    "merged": {"plain": 0.9, "suffixes": {"value": 1.0, "low": None, "high": None}},
}


def linear(colour: str) -> list[float]:
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]


def lightness(colour: str, seen: tuple[tuple[float, ...], ...] | None = None) -> float:
    """CIE L*, from 0 to 100."""
    rgb = linear(colour)
    if seen:
        rgb = [sum(weight * part for weight, part in zip(row, rgb, strict=True)) for row in seen]
    luminance = 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


@pytest.mark.parametrize("seen", [None, PROTAN, DEUTAN], ids=["all cones", "protan", "deutan"])
def test_bars_of_the_methods_differ_in_lightness_for_everyone(seen: tuple[tuple[float, ...], ...] | None) -> None:
    tones = [lightness(figures.LOOKS[number].colour, seen) for number in figures.METHODS.values()]
    assert tones == sorted(tones, reverse=True)
    assert min(lighter - darker for lighter, darker in itertools.pairwise(tones)) > 8


def test_lines_differ_in_marker_and_dash_and_are_dark_enough_on_white() -> None:
    assert len({look.marker for look in figures.LOOKS}) == len({str(look.dash) for look in figures.LOOKS}) == 8
    assert max(lightness(look.line) for look in figures.LOOKS) < 65


def test_a_method_looks_the_same_whatever_stands_beside_it() -> None:
    alone, beside = figures.looks(["merged"]), figures.looks(["mine", "base", "merged", "other"])
    assert alone["merged"] is beside["merged"]
    assert len({id(look) for look in beside.values()}) == 4
    assert len(figures.looks(map(str, range(20)))) == 20


def test_bars_have_their_values_their_intervals_and_say_what_is_missing() -> None:
    figure = figures.bars(SHARES, "share", labels={"merged": "DPO + introspection"}, limits=(0, 1), percent=True)
    (axes,) = figure.axes
    base, merged = (part for part in axes.containers if isinstance(part, BarContainer))
    assert [bar.get_height() for bar in merged] == [0.9, 1.0]
    (ends, _), *_ = base.errorbar.lines[2][0].get_segments(), None
    assert [end[1] for end in ends] == pytest.approx([0.05, 0.2])
    assert [text.get_text() for text in axes.texts] == ["n/a"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["plain", "suffixes"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["base", "DPO + introspection"]
    assert axes.get_ylim()[1] > 1


def test_hatches_are_lines_since_dots_make_a_large_file() -> None:
    assert len({look.hatch for look in figures.LOOKS}) == 6
    shares = {name: {"plain": 0.5} for name in [*figures.METHODS, "mine", "yours"]}
    file = io.StringIO()
    figures.bars(shares, "share").savefig(file, format="svg")
    assert len(file.getvalue()) < 100_000


def test_marks_stand_on_their_bar_and_last_in_the_legend() -> None:
    figure = figures.bars(SHARES, "share", marks={"merged": {"suffixes": 0.87}}, mark_label="published")
    (axes,) = figure.axes
    (mark,) = [line for line in axes.lines if line.get_marker() == "D"]
    bar = axes.containers[-1].patches[1]
    assert mark.get_ydata()[0] == 0.87 and bar.get_x() < mark.get_xdata()[0] < bar.get_x() + bar.get_width()
    assert figure.legends[0].get_texts()[-1].get_text() == "published"


def test_horizontal_bars_grow_with_their_number() -> None:
    many = {"after": {f"trait {number}": number - 20.0 for number in range(40)}}
    figure = figures.bars(many, "change", horizontal=True, reference=0)
    assert figure.get_size_inches()[1] > 8
    assert figure.axes[0].yaxis_inverted() and not figure.legends


def test_a_line_has_a_gap_where_nothing_was_measured() -> None:
    figure = figures.lines({"loss": {1: 2.0, 2: None, 3: {"value": 1.0, "low": 0.5, "high": 1.5}}}, "step", "loss")
    (drawn,) = figure.axes[0].containers
    values = list(drawn.lines[0].get_ydata())
    assert values[0] == 2 and math.isnan(values[1]) and values[2] == 1
    assert not figures.lines({"loss": {1: 2.0}}, "step", "loss").axes[0].containers[0].has_yerr


@pytest.mark.parametrize("empty", [{}, {"base": {}}])
def test_nothing_to_draw_is_an_empty_figure(empty: figures.Series) -> None:
    assert isinstance(figures.bars(empty, "share"), Figure)
    assert isinstance(figures.lines(empty, "step", "loss"), Figure)
