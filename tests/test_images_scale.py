"""JPEG files decoded at a fraction of their size: what they stay, and what is left alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from molmo_edge import EdgeVLM
from molmo_edge.engine.fake import FakeEngine
from molmo_edge.errors import ImageError
from molmo_edge.images import DEFAULT_LIMITS, ImageLimits, Loaded, load, load_for, to_array
from molmo_edge.interface import Turn
from molmo_edge.models.molmo.family import Molmo
from molmo_edge.models.molmo.image_processor import STD, MolmoImageProcessor
from molmo_edge.models.molmo.tiling import BASE, fit, layout_for, scaled_size
from tests.data.images import make
from tests.picture_files import ACCEPTED, REFUSED, files

WIDTH, HEIGHT = 800, 600


def scene(width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> Image.Image:
    """Structure at every scale, as photographs have it, and a sharp edge."""
    rng = np.random.default_rng(seed)
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falloff = np.maximum(np.hypot(y, x), 1 / max(width, height))
    noise = np.fft.rfft2(rng.normal(size=(height, width)))
    light = np.fft.irfft2(noise / falloff, (height, width))
    levels = 120 + light[..., None] / light.std() * (40, 36, 30)
    levels[height // 4 : height // 2, width // 4 : width // 2] += (90, -60, 30)
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def jpeg(picture: Image.Image, **options: Any) -> bytes:
    return make.encode(picture, "JPEG", quality=92, **options)


def at(data: Any, width: int, height: int) -> Loaded:
    return load_for(data, lambda size: (width, height))


def difference(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(to_array(one).astype(int) - to_array(other)).mean())


@pytest.mark.parametrize(
    ("needed", "expected"),
    [
        ((WIDTH, HEIGHT), (WIDTH, HEIGHT)),
        ((401, 1), (WIDTH, HEIGHT)),
        ((1, 301), (WIDTH, HEIGHT)),
        ((400, 300), (400, 300)),
        ((201, 150), (400, 300)),
        ((200, 150), (200, 150)),
        ((100, 75), (100, 75)),
        ((1, 1), (100, 75)),
        ((5000, 5000), (WIDTH, HEIGHT)),
    ],
)
def test_the_smallest_fraction_that_is_enough_is_decoded(
    needed: tuple[int, int], expected: tuple[int, int]
) -> None:
    data = jpeg(scene())
    loaded = at(data, *needed)
    assert loaded.picture.size == expected
    assert loaded.picture.mode == "RGB" and loaded.picture.info == {}
    assert loaded.size == (WIDTH, HEIGHT)
    if expected == (WIDTH, HEIGHT):
        assert loaded.source is loaded.picture and loaded.picture == load(data)
    else:
        assert loaded.source == data
        assert difference(loaded.picture, load(data).resize(expected, Image.Resampling.BOX)) < 2


@settings(deadline=None, max_examples=60)
@given(*[st.integers(1, 150)] * 4)
@example(1, 1, 1, 1)
@example(150, 1, 1, 1)
@example(9, 15, 1, 1)
def test_nothing_is_decoded_below_what_is_needed(
    width: int, height: int, across: int, down: int
) -> None:
    data = jpeg(Image.new("RGB", (width, height), (10, 200, 60)))
    loaded = at(data, across, down)
    assert loaded.size == (width, height)
    for got, whole, needed in zip(
        loaded.picture.size, (width, height), (across, down), strict=True
    ):
        assert got >= min(whole, needed)
        # Within half a pixel of the fraction, so that scaling it moves nothing.
        assert min(abs(got - whole / factor) for factor in (1, 2, 4, 8)) <= 0.5


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"restart_marker_rows": 1}],
    ids=str,
)
def test_every_kind_of_jpeg_shows_the_same_at_a_quarter(options: dict[str, Any]) -> None:
    data = jpeg(scene(), **options)
    loaded = at(data, 200, 150)
    assert loaded.picture.size == (200, 150)
    assert difference(loaded.picture, load(data).resize((200, 150), Image.Resampling.BOX)) < 2


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_become_rgb(mode: str) -> None:
    data = jpeg(scene().convert(mode))
    loaded = at(data, 100, 75)
    assert (loaded.picture.mode, loaded.picture.size) == ("RGB", (100, 75))
    assert difference(loaded.picture, load(data).resize((100, 75), Image.Resampling.BOX)) < 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_upright_and_of_its_upright_size(orientation: int) -> None:
    size = (WIDTH, HEIGHT) if orientation < 5 else (HEIGHT, WIDTH)
    asked = []

    def needed(size: tuple[int, int]) -> tuple[int, int]:
        asked.append(size)
        return size[0] // 4, size[1] // 4

    data = jpeg(scene(), exif=make.exif(orientation))
    loaded = load_for(data, needed)
    assert asked == [size] and loaded.size == size == load(data).size
    quarter = (size[0] // 4, size[1] // 4)
    assert loaded.picture.size == quarter
    assert difference(loaded.picture, load(data).resize(quarter, Image.Resampling.BOX)) < 2
    assert load(loaded.source).size == size


def test_a_narrow_need_follows_the_upright_sides() -> None:
    data = jpeg(scene(), exif=make.exif(6))  # stored lying: 800 x 600, upright 600 x 800
    assert at(data, 300, 1).picture.size == (300, 400)
    assert at(data, 1, 300).picture.size == (300, 400)
    assert at(data, 301, 1).picture.size == (600, 800)


def test_a_phones_mpo_is_its_first_picture() -> None:
    stream = io.BytesIO()
    scene().save(
        stream, "MPO", save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))], quality=92
    )
    data = stream.getvalue()
    loaded = at(data, 400, 300)
    assert (loaded.picture.size, loaded.size) == ((400, 300), (WIDTH, HEIGHT))
    assert difference(loaded.picture, scene().resize((400, 300), Image.Resampling.BOX)) < 4
    assert load(loaded.source) == load(data)


def test_paths_and_pictures_not_decoded_yet_are_reduced_alike(tmp_path: Path) -> None:
    data = jpeg(scene())
    path = tmp_path / "scene.jpg"
    path.write_bytes(data)
    with Image.open(path) as opened:
        for same in (path, str(path), bytearray(data), memoryview(data), opened):
            loaded = at(same, 100, 75)
            assert loaded == at(data, 100, 75)
    # What was loaded outlives the file.
    path.unlink()
    assert load(loaded.source).size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "BMP"])
def test_other_formats_arrays_and_decoded_pictures_stay_whole(file_format: str) -> None:
    picture = scene()
    decoded = Image.open(io.BytesIO(jpeg(picture)))
    decoded.load()
    for image in (make.encode(picture, file_format), to_array(picture), picture, decoded):
        loaded = at(image, 1, 1)
        assert loaded.picture.size == loaded.size == (WIDTH, HEIGHT)
        assert loaded.picture == load(image) and loaded.source is loaded.picture


@pytest.mark.parametrize("path", files(ACCEPTED))
def test_without_a_need_every_file_is_what_load_gives(path: Path) -> None:
    for needed in (None, lambda size: None):
        loaded = load_for(path, needed)
        assert loaded.picture == load(path) and loaded.source is loaded.picture
        assert loaded.size == loaded.picture.size


@pytest.mark.parametrize("path", files(REFUSED))
def test_refused_files_are_refused_at_any_size(path: Path) -> None:
    with pytest.raises(ImageError):
        at(path, 1, 1)


def test_a_file_cut_short_is_refused_at_any_size() -> None:
    data = jpeg(scene())
    with pytest.raises(ImageError):
        at(data[: len(data) // 2], 1, 1)


def test_the_caps_hold_for_the_whole_picture() -> None:
    with pytest.raises(ImageError, match="pixels"):
        load_for(jpeg(scene()), lambda size: (1, 1), ImageLimits(max_pixels=WIDTH * HEIGHT - 1))


# With Molmo's crops


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(1, 20))
def test_both_views_fit_into_the_size_that_is_asked_for(
    width: int, height: int, max_crops: int
) -> None:
    wide, high = scaled_size((width, height), max_crops)
    for canvas in ((BASE, BASE), layout_for(height, width, max_crops).pixel_shape):
        _, _, down, across = fit(height, width, canvas)
        assert across <= wide and down <= high


@pytest.mark.parametrize(
    ("size", "max_crops"), [((1600, 1200), 1), ((1601, 1203), 1), ((2000, 1500), 2)]
)
def test_crops_differ_by_little_and_lie_where_they_lay(
    size: tuple[int, int], max_crops: int
) -> None:
    data = jpeg(scene(*size))
    processor = MolmoImageProcessor(max_crops=max_crops)
    loaded = load_for(data, lambda size: scaled_size(size, max_crops))
    assert loaded.size == size != loaded.picture.size
    whole = processor.inputs(load(data))
    reduced = processor.inputs(loaded.picture, loaded.size)
    assert reduced.layout is whole.layout is processor.layout(loaded.picture, loaded.size)
    assert reduced.image_masks.equal(whole.image_masks)
    levels = (reduced.images - whole.images).abs() * (255 * min(STD))
    assert float(levels.mean()) < 2
    assert float(levels.max()) < 25


def test_a_smaller_copy_takes_the_tiling_of_the_whole() -> None:
    # On its own the smaller one would be tiled otherwise.
    processor = MolmoImageProcessor()
    small = scene(300, 220)
    assert processor.layout(small) is not processor.layout(small, (1200, 880))
    assert processor.inputs(small, (1200, 880)).layout is processor.layout(small, (1200, 880))


# Through `EdgeVLM`

POINT = '<point x="50.0" y="25.0" alt="mug">mug</point>'


class Eyes:
    """A fake engine that keeps the turns it was asked about."""

    def __init__(self, **options: Any) -> None:
        self.seen: list[Turn] = []
        self.vlm = EdgeVLM(engine=FakeEngine.factory(self._answer), **options)
        self.vlm.family = Molmo()

    def _answer(self, turns: Any) -> str:
        self.seen += turns
        return POINT

    def __enter__(self) -> Eyes:
        return self

    def __exit__(self, *exc: object) -> None:
        self.vlm.close()


def test_points_and_drawings_refer_to_the_whole_picture() -> None:
    data = jpeg(scene(1600, 1200), exif=make.exif(8))
    with Eyes(jpeg_scale="reduced", max_crops=1) as eyes:
        answer = eyes.vlm.point(data, "mug")
    [turn] = eyes.seen
    assert turn.sizes == ((1200, 1600),)
    assert turn.images[0].size == (300, 400)
    assert answer.points[0].px((1200, 1600)) == (600, 400)
    assert answer.image == data
    assert answer.draw().size == (1200, 1600)


def test_fewer_crops_of_one_request_need_less_of_the_picture() -> None:
    data = jpeg(scene(1600, 1200))
    with Eyes(jpeg_scale="reduced") as eyes:
        for max_crops in (None, 1):
            eyes.vlm.query(data, "q", max_crops=max_crops)
            content = [{"type": "image", "image": data}, {"type": "text", "text": "q"}]
            eyes.vlm.chat([{"role": "user", "content": content}], max_crops=max_crops)
    # The crops show 1008 x 756 of it, then 336 x 252.
    assert [turn.images[0].size for turn in eyes.seen] == [(1600, 1200)] * 2 + [(400, 300)] * 2
    assert {turn.sizes for turn in eyes.seen} == {((1600, 1200),)}


def test_by_default_everything_is_decoded() -> None:
    data = jpeg(scene(1600, 1200))
    with Eyes(max_crops=1) as eyes:
        answer = eyes.vlm.point(data, "mug")
    assert eyes.seen[0].images[0] == load(data, DEFAULT_LIMITS)
    assert answer.image is eyes.seen[0].images[0]
