"""PIL images that callers hand in stay theirs, and whatever PIL raises is mapped."""

from __future__ import annotations

import ast
import builtins
import importlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFile

from molmo_edge.errors import ImageError
from molmo_edge.images import FOREIGN_ERRORS, load
from tests import fuzz_images
from tests.data.images import make
from tests.picture_files import ACCEPTED, REFUSED, files, opened, pixels, png

# PIL images


class Labelled(Image.Image):
    """A caller's own subclass."""

    label = "mine"


def test_pil_images_are_left_as_they_are() -> None:
    picture = fuzz_images.picture_of_mode("P", (9, 9))
    picture.info.update(transparency=bytes(range(200)), exif=make.exif(6), note=["x"])
    before = picture.tobytes(), dict(picture.info), picture.getpalette("RGBA"), picture.mode
    load(picture)
    after = picture.tobytes(), dict(picture.info), picture.getpalette("RGBA"), picture.mode
    assert after == before


def test_the_answer_is_a_new_picture() -> None:
    picture = make.corners()
    answer = load(picture)
    answer.paste((0, 0, 0), (0, 0, 48, 32))
    assert picture == make.corners()


def test_subclasses_load() -> None:
    picture = Labelled()
    source = make.corners()
    picture.__setstate__(source.__getstate__())
    assert type(load(picture)) is Image.Image
    assert pixels(load(picture)) == pixels(source)


@pytest.mark.parametrize("path", files(ACCEPTED))
def test_lazy_images_are_neither_decoded_nor_moved(path: Path) -> None:
    try:
        lazy = opened(path)
    except (SyntaxError, ValueError, OSError):
        assert path.name.startswith("text_")  # PIL gives up over the text we skip
        return
    state = lazy.fp, lazy.fp.tell(), list(lazy.tile), dict(lazy.info), lazy._im
    assert load(lazy) == load(path)
    assert (lazy.fp, lazy.fp.tell(), lazy.tile, lazy.info, lazy._im) == state


def test_lazy_images_with_a_file_of_their_own_keep_it() -> None:
    lazy: Any
    with Image.open(ACCEPTED / "exif_6.png") as lazy:
        position = lazy.fp.tell()
        assert load(lazy).size == (48, 32)
        assert lazy.fp.tell() == position and lazy.size == (32, 48)
        lazy.load()


@pytest.mark.parametrize("name", ["animated.png", "animated.webp", "phone.mpo"])
def test_a_later_frame_is_the_one_the_caller_chose(name: str) -> None:
    lazy = opened(ACCEPTED / name)
    lazy.seek(1)
    assert pixels(load(lazy)) != pixels(load(ACCEPTED / name))
    assert pixels(load(lazy)) == pixels(lazy.convert("RGB"))


def test_a_drafted_picture_keeps_the_size_the_caller_asked_for() -> None:
    lazy = Image.open(io.BytesIO(make.encode(make.corners(), "JPEG")))
    lazy.draft("RGB", (24, 16))
    assert load(lazy).size == lazy.size == (24, 16)


def test_closed_images_are_refused() -> None:
    lazy, decoded = (opened(ACCEPTED / "palette.png") for _ in range(2))
    made = make.corners()
    decoded.load()
    for image in (lazy, decoded, made):
        image.close()
    for image in (lazy, decoded, made):
        with pytest.raises(ImageError, match="closed"):
            load(image)


def test_images_whose_file_was_closed_under_them_are_refused() -> None:
    file = io.BytesIO(png())
    lazy = Image.open(file)
    file.close()
    with pytest.raises(ImageError, match="closed") as caught:
        load(lazy)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("name", ["page.eps", "picture.gif", "picture.tif"])
def test_lazy_images_of_other_formats_are_not_decoded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy = opened(REFUSED / name)

    def decode(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(type(lazy), "load", decode)
    with pytest.raises(ImageError, match=str(lazy.format)) as caught:
        load(lazy)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("name", ["picture.gif", "picture.tif"])
def test_decoded_images_of_other_formats_load(name: str) -> None:
    picture = opened(REFUSED / name)
    picture.load()
    assert pixels(load(picture)) == pixels(picture.convert("RGB"))


def test_uninitialised_images_are_refused() -> None:
    with pytest.raises(ImageError, match="empty"):
        load(Image.Image())


# Errors


@pytest.mark.parametrize("kind", FOREIGN_ERRORS, ids=lambda kind: kind.__name__)
def test_foreign_errors_are_mapped_with_their_cause(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    raised = kind("<secret at 0x7f00>")

    def fail(self: Any) -> None:
        raise raised

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ImageError) as caught:
        load(png())
    assert caught.value.__cause__ is raised
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_interrupts_pass_through(
    kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any) -> None:
        raise kind

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(kind):
        load(png())


PIL_MODULES = [
    "Image", "ImageFile", "ImageMode", "ImagePalette", "_binary", "_util", "BmpImagePlugin",
    "JpegImagePlugin", "PngImagePlugin", "WebPImagePlugin", "MpoImagePlugin",
]  # fmt: skip


@pytest.mark.parametrize("name", PIL_MODULES)
def test_every_error_that_pil_raises_is_mapped(name: str) -> None:
    module = importlib.import_module(f"PIL.{name}")
    assert module.__file__
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
            continue
        called = node.exc.func
        if not isinstance(called, ast.Name):
            continue
        kind = getattr(module, called.id, getattr(builtins, called.id, None))
        if isinstance(kind, type):
            assert issubclass(kind, FOREIGN_ERRORS), called.id


@pytest.mark.parametrize(
    "kind",
    [
        AssertionError, AttributeError, BlockingIOError, BufferError, EOFError, ImportError,
        IndexError, KeyError, MemoryError, NotImplementedError, OverflowError, RecursionError,
        TypeError, UnicodeDecodeError, UserWarning, ZeroDivisionError, struct.error, zlib.error,
    ],
)  # fmt: skip
def test_errors_that_pil_lets_through_are_mapped(kind: type[Exception]) -> None:
    assert issubclass(kind, FOREIGN_ERRORS)


def test_every_error_class_of_pil_is_mapped() -> None:
    for name in PIL_MODULES:
        for value in vars(importlib.import_module(f"PIL.{name}")).values():
            if isinstance(value, type) and issubclass(value, Exception):
                assert issubclass(value, FOREIGN_ERRORS), value
