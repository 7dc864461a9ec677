"""What notebooks show of answers, and figures as images."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from molmo_edge import Choice, EdgeVLM, Video
from molmo_edge.engine.fake import FakeEngine
from molmo_edge.errors import ImageError

P = '<p style="white-space: pre-wrap">'
POINTS = '<points coords="1 1 500 500;2 2 250 250">a "cup"</points>'
TRACKS = '<tracks coords="0.0 1 100 100;1.0 1 900 900">cat</tracks>'


def shown(html: str) -> list[Image.Image]:
    data = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="">', html)
    return [Image.open(io.BytesIO(base64.b64decode(one))) for one in data]


def answer(turns: Any) -> str:
    text = turns[-1].text
    return TRACKS if "rack" in text else POINTS if "oint" in text else "1 < 2 & <b>bold</b>"


def test_answers_show_themselves() -> None:
    images = [np.zeros((900, 1200, 3), np.uint8), np.zeros((48, 64, 3), np.uint8)]
    with EdgeVLM(engine=FakeEngine.factory(answer)) as vlm:
        said = vlm.query(None, "What?")._repr_html_()
        assert said == f"{P}1 &lt; 2 &amp; &lt;b&gt;bold&lt;/b&gt;</p>"
        points = vlm.point(images, "a cup")
        tracks = vlm.track(Video([images[1]] * 9, fps=2), "cat")
        counted = vlm.count(images[1], "points")
    html = points._repr_html_()
    first, second = shown(html)
    assert html.startswith(f"{P}a cup: 2</p>")
    assert first.size == (640, 480) and second.size == (64, 48)
    assert first.getpixel((320, 240)) != (0, 0, 0)
    assert [one.size for one in shown(tracks._repr_html_())] == [(64, 48)] * 3
    assert counted._repr_html_() == counted.points._repr_html_()
    for stated in ("There are 5 cups.", "I cannot say."):
        with EdgeVLM(engine=FakeEngine.factory(stated)) as vlm:
            assert vlm.count(images[1], "cups")._repr_html_() == f"{P}{stated}</p>"
    with EdgeVLM(engine=FakeEngine.factory("There are none.")) as vlm:
        assert vlm.count(images[1], "cups")._repr_html_() == f"{P}cups: 0</p>"
    choice = Choice("b", {"a": 0.25, "b": 0.75}, outside=0.0)
    assert choice._repr_html_() == f"{P}0.750 b\n0.250 a</p>"


def test_a_figure_is_an_image_as_it_would_be_saved() -> None:
    figure = Figure(figsize=(3, 2), dpi=100)
    figure.add_subplot().plot([1, 2])
    sizes: list[Any] = []
    fake = FakeEngine.factory(lambda turns: sizes.append(turns[-1].images[0].size) or "A line.")
    with EdgeVLM(engine=fake) as vlm:
        assert vlm.query(figure, "What is it?").text == "A line."
        figure.savefig(png := io.BytesIO(), format="png", bbox_inches="tight")
        assert sizes[-1] == Image.open(png).size
        figure.set_size_inches(1e6, 1e6)
        with pytest.raises(ImageError):
            vlm.query(figure, "What is it?")
