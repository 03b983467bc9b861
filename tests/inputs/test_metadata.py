"""Broken metadata never costs a picture, and pictures are rotated if their orientation can be read."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tests.golden import fill
from tinyclip.inputs.decoding import open_image
from tinyclip.inputs.metadata import bare, orientation_in

SCENE = fill.picture(60, 40, 0)
TURNED = np.rot90(SCENE, -1)  # rotated as for orientation 6
TIFF = b"II*\0\x08\0\0\0"
SHORT_6 = struct.pack("<HH", 6, 0)


def entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
    return struct.pack("<HHI", tag, kind, count) + value


def exif(*entries: bytes, after: bytes = b"", count: int | None = None) -> bytes:
    """Return an EXIF block with one directory, which may claim a different number of entries."""
    number = struct.pack("<H", len(entries) if count is None else count)
    return TIFF + number + b"".join(entries) + bytes(4) + after


ORIENTATION = entry(0x112, 3, 1, SHORT_6)
END = struct.pack("<I", 8 + 2 + 2 * 12 + 4)  # where the data after two entries begins

BROKEN = {  # each with orientation 6
    "a signed rational that Pillow cannot write": exif(
        ORIENTATION, entry(0x11A, 10, 1, END), after=struct.pack("<ii", -1, 0)
    ),
    "a rational as text": exif(entry(0x10E, 5, 1, END), ORIENTATION, after=struct.pack("<II", 72, 1)),
    "text as a rational": exif(ORIENTATION, entry(0x11A, 2, 4, b"72\0\0")),
    "a text of four gigabytes": exif(entry(0x10E, 2, 2**32 - 1, END), ORIENTATION),
    "a place beyond the end": exif(entry(0x10F, 2, 9, struct.pack("<I", 2**31)), ORIENTATION),
    "an unknown type": exif(entry(0x10F, 99, 1, bytes(4)), ORIENTATION),
    "more entries than there are": exif(ORIENTATION, count=65_535),
    "cut off after the orientation": exif(ORIENTATION)[: 8 + 2 + 12],
    "directories that refer to themselves": exif(
        ORIENTATION, entry(0x8769, 4, 1, struct.pack("<I", 8)), entry(0x8825, 4, 1, struct.pack("<I", 8))
    )[:-4]
    + struct.pack("<I", 8),
    "a maker's note of wrong type": exif(ORIENTATION, entry(0x8769, 2, 3, b"ab\0\0")),
    "orientation as LONG": exif(entry(0x112, 4, 1, struct.pack("<I", 6))),
    "orientation as BYTE": exif(entry(0x112, 1, 1, b"\x06\0\0\0")),
    "orientation as a float": exif(entry(0x112, 11, 1, struct.pack("<f", 6))),
    "two orientations in one": exif(entry(0x112, 3, 2, struct.pack("<HH", 6, 6))),
}
NONE = {  # no orientation can be read
    "no header": b"\0\x08\0\x02\x01\x12\0\x03" + bytes(10),
    "nothing": b"",
    "rubbish": b"rubbish of no kind at all",
    "a directory beyond the end": b"II*\0" + struct.pack("<I", 2**31),
    "cut off within the orientation": exif(ORIENTATION)[: 8 + 2 + 6],
    "orientation 0": exif(entry(0x112, 3, 1, bytes(4))),
    "orientation 9": exif(entry(0x112, 3, 1, struct.pack("<HH", 9, 0))),
    "orientation -6": exif(entry(0x112, 9, 1, struct.pack("<i", -6))),
    "orientation as text": exif(entry(0x112, 2, 2, b"6\0\0\0")),
    "orientation as no number": exif(entry(0x112, 11, 1, struct.pack("<f", float("nan")))),
    "orientation as a fraction of nothing": exif(entry(0x112, 5, 1, END), ORIENTATION[:0], after=bytes(8)),
    "no values": exif(entry(0x112, 3, 0, SHORT_6)),
}


def encoded(format: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(SCENE).save(file, format, **options)
    return file.getvalue()


def segment(kind: int, data: bytes) -> bytes:
    return bytes([0xFF, kind]) + struct.pack(">H", len(data) + 2) + data


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def jpeg(*segments: bytes) -> bytes:
    data = encoded("JPEG", quality=100, subsampling=0)
    return data[:2] + b"".join(segments) + data[2:]


def png(*chunks: bytes, last: bool = False) -> bytes:
    """Return a PNG with chunks before or after the pixels."""
    data = encoded("PNG")
    place = len(data) - 12 if last else 33
    return data[:place] + b"".join(chunks) + data[place:]


def webp(**chunks: bytes) -> bytes:
    """Return a lossless WebP with these chunks, whatever they contain."""
    data = encoded("WEBP", lossless=True)[12:]
    flags = sum({"ICCP": 32, "EXIF": 8, "XMP_": 4}[name] for name in chunks)
    size = b"".join(struct.pack("<I", side - 1)[:3] for side in (60, 40))
    body = b"VP8X" + struct.pack("<I", 10) + bytes([flags, 0, 0, 0]) + size + data
    for name, held in chunks.items():
        body += name.replace("_", " ").encode() + struct.pack("<I", len(held)) + held + b"\0" * (len(held) % 2)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def tiff(*entries: bytes, after: int = 0) -> bytes:
    """Return an uncompressed TIFF with extra entries, and the position of the next directory. The order of tags does
    not matter."""
    raw = SCENE.tobytes()
    start = 8 + len(raw)
    bits = start + 2 + (9 + len(entries)) * 12 + 4
    values = {256: 60, 257: 40, 259: 1, 262: 2, 273: 8, 277: 3, 278: 40, 279: len(raw)}
    known = [entry(tag, 4, 1, struct.pack("<I", value)) for tag, value in values.items()]
    known.append(entry(258, 3, 3, struct.pack("<I", bits)))
    table = struct.pack("<H", len(known) + len(entries)) + b"".join([*known, *entries]) + struct.pack("<I", after)
    return b"II*\0" + struct.pack("<I", start) + raw + table + struct.pack("<HHH", 8, 8, 8)


def opened(data: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return np.asarray(open_image(io.BytesIO(data)).convert("RGB")).astype(int)


def check(data: bytes, turned: bool, near: int = 0) -> None:
    wanted = TURNED if turned else SCENE
    found = opened(data)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= near


WAYS: dict[str, tuple[Callable[[bytes], bytes], int]] = {
    "JPEG": (lambda block: jpeg(segment(0xE1, b"Exif\0\0" + block)), 40),
    "PNG": (lambda block: png(chunk(b"eXIf", block)), 0),
    "PNG, after its pixels": (lambda block: png(chunk(b"eXIf", block), last=True), 0),
    "PNG, as ImageMagick": (lambda block: png(chunk(b"tEXt", _profile((b"Exif\0\0" + block).hex()))), 0),
    "WebP": (lambda block: webp(EXIF=block), 0),
}


def _profile(digits: str) -> bytes:
    return b"Raw profile type exif\0\nexif\n    " + str(len(digits) // 2).encode() + b"\n" + digits.encode() + b"\n"


@pytest.mark.parametrize("way", WAYS)
def test_the_orientation_is_read_whatever_is_wrong_beside_it(way: str) -> None:
    make, near = WAYS[way]
    for name, block in BROKEN.items():
        assert orientation_in(block) == 6, name
        check(make(block), turned=True, near=near)


@pytest.mark.parametrize("way", WAYS)
def test_without_a_readable_orientation_the_picture_stays_as_it_is(way: str) -> None:
    make, near = WAYS[way]
    for block in NONE.values():
        check(make(block), turned=False, near=near)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
XMP_JPEG = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)


@pytest.mark.parametrize(
    ("data", "turned"),
    [
        pytest.param(lambda: jpeg(XMP_JPEG), True, id="in XMP alone"),
        pytest.param(lambda: webp(XMP_=XMP), True, id="in XMP alone, WebP"),
        pytest.param(
            lambda: jpeg(segment(0xE1, b"Exif\0\0" + NONE["no header"]), XMP_JPEG), True, id="EXIF unreadable"
        ),
        pytest.param(
            lambda: jpeg(segment(0xE1, b"Exif\0\0" + exif(entry(0x112, 3, 1, b"\1\0\0\0"))), XMP_JPEG),
            False,
            id="EXIF before XMP",
        ),
        pytest.param(lambda: jpeg(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe<")), False, id="XMP broken"),
        pytest.param(
            lambda: jpeg(segment(0xE2, b"ICC_PROFILE\0\1\3none")), False, id="ICC in parts that are not there"
        ),
        pytest.param(lambda: jpeg(segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff")), False, id="MPF beyond the end"),
        pytest.param(lambda: jpeg(segment(0xE2, b"MPF\0no")), False, id="MPF broken"),
        pytest.param(lambda: jpeg(segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04")), False, id="Photoshop cut off"),
        pytest.param(lambda: jpeg(segment(0xE0, b"JFIF\0")), False, id="JFIF cut off"),
        pytest.param(lambda: jpeg(segment(0xEE, b"Adobe")), False, id="Adobe cut off"),
        pytest.param(lambda: jpeg(segment(0xE1, b""), segment(0xFE, b"")), False, id="empty"),
    ],
)
def test_other_metadata_of_jpeg(data: Callable[[], bytes], turned: bool) -> None:
    check(data(), turned, near=40)


BOMB = zlib.compress(bytes(80_000_000), 9)


@pytest.mark.parametrize("last", [False, True], ids=["before the pixels", "after"])
@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([chunk(b"zTXt", b"Comment\0\0" + BOMB)], id="text that unpacks to 80 MB"),
        pytest.param([chunk(b"iTXt", b"Comment\0\1\0\0\0" + BOMB)], id="the same as iTXt"),
        pytest.param([chunk(b"iCCP", b"icc\0\0" + BOMB)], id="a profile that unpacks to 80 MB"),
        pytest.param([chunk(b"iCCP", b"icc\0\0none")], id="a profile that does not unpack"),
        pytest.param([chunk(b"iCCP", b"icc\0\7none")], id="a profile of unknown compression"),
        pytest.param([chunk(b"zTXt", b"Comment\0\7none")], id="text of unknown compression"),
        pytest.param([chunk(b"tEXt", b"\xff\xfe")], id="text without a key"),
        pytest.param([chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0\xff\xfe")], id="text that is not UTF-8"),
        pytest.param([chunk(b"tEXt", _profile("no hexadecimal"))], id="a profile that is not hexadecimal"),
        pytest.param([chunk(b"tEXt", b"Raw profile type exif\0x")], id="a profile of one line"),
        pytest.param([chunk(b"gAMA", b"")], id="no gamma"),
        pytest.param([chunk(b"cHRM", b"12345")], id="primaries of five bytes"),
        pytest.param([chunk(b"pHYs", b"1")], id="resolution of a byte"),
        pytest.param([chunk(b"sRGB", b"")], id="no intent"),
        pytest.param([chunk(b"tIME", b"no time"), chunk(b"tIME", b"no time")], id="time twice"),
        pytest.param([chunk(b"tEXt", b"key\0text", crc=0)], id="text with another checksum"),
        pytest.param([chunk(b"eXIf", exif(), crc=0)], id="EXIF with another checksum"),
        pytest.param([chunk(b"acTL", b"")], id="an animation of nothing"),
        pytest.param([chunk(b"tRNS", b"12345")], id="a transparent colour of five bytes"),
    ],
)
def test_other_metadata_of_png(chunks: list[bytes], last: bool) -> None:
    check(png(*chunks, last=last), turned=False)


def test_the_orientation_is_kept_where_other_metadata_must_go() -> None:
    check(png(chunk(b"eXIf", BROKEN["orientation as LONG"]), chunk(b"gAMA", b"")), turned=True)
    check(jpeg(segment(0xE1, b"Exif\0\0" + exif(ORIENTATION)), segment(0xEE, b"Adobe")), turned=True, near=40)


@pytest.mark.parametrize("name", ["ICCP", "XMP_"])
def test_other_metadata_of_webp(name: str) -> None:
    check(webp(**{name: b"no such thing"}), turned=False)
    check(webp(**{name: b"", "EXIF": exif(ORIENTATION)}), turned=True)


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param([], id="nothing else"),
        pytest.param([entry(282, 10, 1, b"\xff\xff\xff\xff"), entry(283, 5, 1, bytes(4))], id="resolution"),
        pytest.param(
            [entry(282, 2, 3, b"ab\0\0"), entry(283, 2, 3, b"ab\0\0"), entry(296, 3, 1, b"\3\0\0\0")], id="text"
        ),
        pytest.param([entry(700, 3, 2, b"abcd")], id="XMP as numbers"),
        pytest.param([entry(34675, 3, 2, b"abcd")], id="a profile as numbers"),
        pytest.param([entry(0x8769, 4, 1, b"\x08\0\0\0")], id="EXIF among the pixels"),
        pytest.param([entry(0x8769, 2, 3, b"ab\0\0"), entry(0x8825, 4, 1, b"\xff\xff\xff\xff")], id="EXIF as text"),
        pytest.param([entry(0x10E, 2, 2**31, bytes(4))], id="a text of two gigabytes"),
        pytest.param([entry(0x10E, 99, 1, bytes(4))], id="an unknown type"),
        pytest.param([entry(37500, 7, 9, b"\xff\xff\xff\xff")], id="a maker's note beyond the end"),
    ],
)
@pytest.mark.parametrize("after", [0, 2**31, 8], ids=["one picture", "a next one beyond the end", "among the pixels"])
def test_metadata_of_tiff(entries: list[bytes], after: int) -> None:
    check(tiff(*entries, after=after), turned=False)
    check(tiff(entry(0x112, 3, 1, SHORT_6), *entries, after=after), turned=True)
    check(tiff(entry(0x112, 2, 2, b"6\0\0\0"), *entries, after=after), turned=False)


def test_a_gif_with_broken_extensions() -> None:
    data = encoded("GIF")
    plain = opened(data)
    start = data.index(b"\x2c", 13 + 3 * 2 ** ((data[10] & 7) + 1))  # the image descriptor
    for block in (b"!\xff\x0bXMP DataXMP\x04abcd\0", b"!\xfe\x02\xff\xfe\0", b"!\xff\x01x\0", b"!\x99\x01x\0"):
        assert np.array_equal(opened(data[:start] + block + data[start:]), plain)


@pytest.mark.parametrize("format", ["AVIF", "HEIF"])
def test_metadata_of_avif_and_heic(format: str) -> None:
    if format == "HEIF":
        import pillow_heif

        pillow_heif.register_heif_opener()
    for block in (NONE["no header"], NONE["rubbish"], *BROKEN.values()):
        whole = exif(entry(0x10E, 2, 4, b"abc\0"), after=b"\1" * 200)  # the encoders accept no other
        data = encoded(format, quality=100, exif=b"Exif\0\0" + whole)
        assert data.count(whole) == 1
        found = opened(data.replace(whole, block.ljust(len(whole), b"\0")))
        assert sorted(found.shape) == [3, 40, 60]
        upright = np.rot90(found) if found.shape[0] == 60 else found  # these rotate by other means than EXIF
        assert np.abs(upright - SCENE).mean() < 12


def test_damaged_pixels_are_still_an_error() -> None:
    for data in (jpeg(XMP_JPEG), png(chunk(b"gAMA", b"")), webp(EXIF=b"x"), tiff(entry(700, 3, 2, b"abcd"))):
        with pytest.raises(ValueError, match=r"damaged picture|not a picture"):
            opened(data[: len(data) // 2])


def test_files_without_metadata_are_as_they_were() -> None:
    assert bare(encoded("GIF")) is None
    assert bare(png()) is None
    assert bare(b"") is None


def test_a_picture_carries_no_metadata_on(tmp_path: Path) -> None:
    """Otherwise another program might fail on it once the picture is stored."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x")
    Image.fromarray(SCENE).save(tmp_path / "a.png", pnginfo=info, exif=exif(ORIENTATION), dpi=(72, 72))
    assert open_image(tmp_path / "a.png").info == {}
