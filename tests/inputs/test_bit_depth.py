"""Pictures with 16 and 32 bits keep their content."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from tests.golden import fill
from tinyclip.data.captioned import Item
from tinyclip.data.pack import pack
from tinyclip.inputs import bit_depth
from tinyclip.inputs.augment import Augment
from tinyclip.inputs.decoding import open_image
from tinyclip.inputs.transforms import Preprocess, plain_mode, thumbnail
from tinyclip.search.sheet import small_copy

GREY = np.asarray(Image.fromarray(fill.picture(48, 48, 0)).convert("L"))
OWN = "values from .*; such a picture is scaled so that its lowest value is black"
UNIT = (GREY.astype(np.float64) - GREY.min()) / (int(GREY.max()) - int(GREY.min()))  # from 0 to 1


@pytest.fixture(autouse=True)
def nothing_said() -> Iterator[None]:
    bit_depth._told.cache_clear()
    yield
    bit_depth._told.cache_clear()


def as_tiff(values: np.ndarray) -> Image.Image:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF")
    return open_image(io.BytesIO(file.getvalue()))


def levels(values: np.ndarray) -> np.ndarray:
    return np.asarray(plain_mode(as_tiff(values))).astype(int)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(GREY.astype(np.float32) / 255, id="float, 0 to 1"),
        pytest.param(GREY.astype(np.float32), id="float, 0 to 255"),
        pytest.param(GREY.astype(np.float32) * 257, id="float, 0 to 65,535"),
        pytest.param(GREY.astype(np.int32), id="int, 0 to 255"),
        pytest.param(GREY.astype(np.int32) * 257, id="int, 0 to 65,535"),
        pytest.param(GREY.astype(np.uint16) * 257, id="16 bits"),
        pytest.param((GREY.astype(np.float32) / 255 * 1.0004) - 0.0002, id="float, resampled"),
    ],
)
def test_numbers_of_a_usual_range_are_the_grey_levels_that_they_were(values: np.ndarray) -> None:
    assert np.abs(levels(values) - GREY).max() <= 1


@pytest.mark.parametrize(
    "values",
    [
        pytest.param((UNIT * 2 - 1).astype(np.float32), id="-1 to 1"),
        pytest.param((UNIT * 2000 - 1000).astype(np.int32), id="-1,000 to 1,000"),
        pytest.param((UNIT * 4095).astype(np.int32), id="12 bits"),
        pytest.param((UNIT * 1.5).astype(np.float32), id="0 to 1.5"),
        pytest.param((UNIT * 1e6).astype(np.int32), id="0 to a million"),
        pytest.param((UNIT + 7e4).astype(np.float32), id="70,000 to 70,001"),
        pytest.param((UNIT * 6e38 - 3e38).astype(np.float32), id="the largest there are"),
        pytest.param((UNIT * 4.2e9 - 2.1e9).astype(np.int64).astype(np.int32), id="all of 32 bits"),
    ],
)
def test_other_numbers_are_scaled_by_their_own_range(values: np.ndarray) -> None:
    with pytest.warns(UserWarning, match=OWN):
        assert np.abs(levels(values) - UNIT * 255).max() <= 3


def test_their_own_range_is_said_once_by_any_thread() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=levels, args=((UNIT * 2 - n).astype(np.float32),)) for n in range(1, 7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(said) == 1


def test_what_is_no_number_is_black_and_what_is_infinite_an_end() -> None:
    values = GREY.astype(np.float32) / 255
    values[0, :3] = np.nan, np.inf, -np.inf
    found = levels(values)
    assert found[0, :3].tolist() == [0, 255, 0]
    assert np.abs(found[1:] - GREY[1:]).max() <= 1
    assert levels(np.full((4, 4), np.nan, np.float32)).max() == 0


@pytest.mark.parametrize(
    ("value", "level"), [(0.0, 0), (0.5, 128), (1.0, 255), (128.0, 128), (255.0, 255), (65535.0, 255)]
)
def test_one_number_alone_is_a_level_of_its_range(value: float, level: int) -> None:
    assert np.abs(levels(np.full((8, 8), value, np.float32)) - level).max() <= 1


@pytest.mark.parametrize("value", [-5.0, 1e6, -3e38])
def test_one_number_alone_beyond_all_ranges_is_no_error(value: float) -> None:
    with pytest.warns(UserWarning, match=OWN):
        assert np.unique(levels(np.full((8, 8), value, np.float32))).tolist() == [0]


def test_a_dark_file_of_16_bits_stays_dark(tmp_path: Path) -> None:
    (tmp_path / "dark.pgm").write_bytes(b"P5 48 48 65535\n" + (GREY.astype(">u2")).tobytes())
    Image.fromarray(GREY.astype(np.uint16)).save(tmp_path / "dark.png")
    for name in ("dark.pgm", "dark.png"):
        assert np.asarray(plain_mode(open_image(tmp_path / name))).max() <= 1


def test_large_numbers_without_a_sign_are_not_negative() -> None:
    values = (UNIT * 4_000_000_000).astype(np.uint32)
    file = io.BytesIO()
    Image.fromarray(values.view(np.int32)).save(file, "TIFF")
    whole = bytearray(file.getvalue())  # as other programs write it: no tag 339, which would mark signed values
    place = whole.index(b"\x53\x01\x03\x00")
    whole[place : place + 12] = b"\x54\x01\x03\0\1\0\0\0\0\0\0\0"
    with pytest.warns(UserWarning, match=OWN):
        found = np.asarray(plain_mode(open_image(io.BytesIO(bytes(whole))))).astype(int)
    assert np.abs(found - UNIT * 255).max() <= 1


def test_every_part_of_the_program_scales_them_alike(tmp_path: Path) -> None:
    place = tmp_path / "a.tif"
    Image.fromarray(GREY.astype(np.float32) / 255).save(place)
    image = open_image(place)
    wanted = Preprocess(image_size=48).pixels(Image.fromarray(GREY)).astype(int)
    views = {
        "evaluation": Preprocess(image_size=48).pixels(image),
        "training": Augment(scale=(1, 1), ratio=1).view(image, 48, Random(0)),
        "page": np.asarray(thumbnail(image).resize((48, 48))).transpose(2, 0, 1),
        "sheet": np.asarray(small_copy(place, 48).convert("RGB")).transpose(2, 0, 1),
    }
    for resize in (None, 24):
        out = tmp_path / f"packed-{resize}"
        pack([Item(place, ("a caption",))], out, resize=resize)
        packed = _picture(out).resize((48, 48))
        views[f"packed {resize}"] = np.asarray(packed.convert("RGB")).transpose(2, 0, 1)
    for name, pixels in views.items():
        assert np.abs(pixels.astype(int) - wanted).mean() < (12 if "24" in name else 1.1), name


def _picture(shards: Path) -> Image.Image:
    from tinyclip.data.samples import image_of
    from tinyclip.data.shards import read_shards

    return image_of(next(iter(read_shards(shards))))
