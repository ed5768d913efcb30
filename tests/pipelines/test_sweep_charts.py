"""The charts of a sweep: whole files, twelve cells told apart, nothing that a name could break."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.report import sweep_charts
from pipelines.report.sweep_charts import Curve, HeatMap, Panel, heat_maps_chart, overlay_chart
from pipelines.report.theme import DARK, LIGHT

FIRST, SECOND = ("0.25", "0.75", "1.25", "1.75"), ("128", "256", "512")
CURVES = [
    Curve((beta, size), [(step, 1 / step + float(beta) / int(size)) for step in range(10, 100, 10)], 90)
    for beta in FIRST
    for size in SECOND
]
PANELS = [Panel("codec", "normalised MSE", CURVES, log=True), Panel("top", "perplexity", CURVES, log=False)]
KEYS = ("commitment", "codebook_size")


def heat_map(**changes: Any) -> HeatMap:
    values = {(beta, size): float(beta) * int(size) for beta in FIRST for size in SECOND}
    made = {"title": "NMSE", "rows": FIRST, "columns": SECOND, "values": values, "write": str, "better": "low"}
    return HeatMap(**{**made, **changes})


@pytest.mark.parametrize("dark", [False, True])
def test_pictures_are_whole_and_the_same_each_time(dark: bool) -> None:
    for draw in (lambda kind: overlay_chart(PANELS, KEYS, kind=kind, dark=dark),
                 lambda kind: heat_maps_chart([heat_map(log=True)], KEYS, kind=kind, dark=dark)):  # fmt: skip
        picture = Image.open(io.BytesIO(draw("png"))).convert("RGB")
        assert min(picture.size) > 150
        assert np.asarray(picture).std() > 5
        text = draw("svg").decode()
        assert ElementTree.fromstring(text).tag.endswith("svg")
        for word in (*FIRST, *SECOND, *KEYS):
            assert word in text
        assert dark or draw("svg").decode() == text


@pytest.mark.parametrize("theme", [LIGHT, DARK])
@pytest.mark.parametrize("values", [1, 4, 6, 11])
def test_cells_can_be_told_apart(values: int, theme: Any) -> None:
    firsts = [str(value) for value in range(values)]
    others = [(size,) for size in SECOND]
    styles = sweep_charts._styles(firsts, others, True, theme)
    drawn = {(style.colour, str(style.dashes), style.marker) for style in styles.values()}
    assert len(drawn) == values * len(SECOND)
    assert {styles["0", other].colour for other in others} == {styles["0", others[0]].colour}
    assert len({styles[first, others[0]].colour for first in firsts}) == values


def test_one_key_three_keys_one_point_and_no_point() -> None:
    short = [Curve(("a",), [(5, 0.5)]), Curve(("b",), []), Curve(("c",), [(5, 0.0), (6, float("inf")), (7, 0.2)])]
    assert overlay_chart([Panel("codec", "normalised MSE", short, log=True)], ["width"], kind="svg")
    three = [Curve((*curve.values, seed), curve.points) for curve in CURVES for seed in ("0", "1")]
    text = overlay_chart([Panel("codec", "x", three, log=False)], [*KEYS, "seed"], kind="svg").decode()
    assert "codebook_size, seed" in text
    assert "128, 1" in text
    with pytest.raises(ValueError, match="no curve has a point"):
        overlay_chart([Panel("codec", "x", [Curve(("a",), [])], log=True)], ["width"])
    with pytest.raises(ValueError, match="no map"):
        heat_maps_chart([], KEYS)


def test_hostile_names_are_shown_as_they_are() -> None:
    bad = "<script>$x^2$</script>\x00" + "y" * 200
    curve = Curve((bad, "b"), [(1, 2.0)])
    text = overlay_chart([Panel(bad, "x", [curve], log=False)], (bad, "k"), kind="svg").decode()
    assert "<script>" not in text
    assert ElementTree.fromstring(text) is not None
    shown = heat_map(rows=[bad], columns=["b"], values={(bad, "b"): 1.0}, title=bad)
    assert "<script>" not in heat_maps_chart([shown], (bad, "k"), kind="svg").decode()


def test_a_heat_map_frames_the_best_and_leaves_failed_cells_empty() -> None:
    values = {("0.25", "128"): 3.0, ("0.25", "256"): 1.0, ("0.75", "128"): 2.0}
    for better, expected in (("low", 1.0), ("high", 3.0)):
        shown = heat_map(rows=FIRST[:2], columns=SECOND[:2], values=values, better=better, write=lambda v: f"v{v:.0f}")
        strengths = sweep_charts._strengths(shown)
        assert max(strengths, key=strengths.__getitem__) == next(k for k, v in values.items() if v == expected)
        text = heat_maps_chart([shown], KEYS, kind="svg").decode()
        assert all(f"v{value:.0f}" in text for value in values.values())
        assert ">-<" in text
    text = heat_maps_chart([heat_map(better=None)], KEYS, kind="svg").decode()
    assert "not ranked" in text
    assert "is better" not in text
    assert text.count("<path") < heat_maps_chart([heat_map()], KEYS, kind="svg").decode().count("<path")  # no frame
    same = sweep_charts._strengths(heat_map(values={("0.25", "128"): 2.0}))
    assert set(same.values()) == {0.0}
