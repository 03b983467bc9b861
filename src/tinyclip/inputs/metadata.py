"""Metadata of image files. It is often malformed, but must never cost us the image. No torch here."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import suppress

from PIL import Image

ORIENTATION = 0x112
TURNS = {  # by EXIF orientation, as in `PIL.ImageOps.exif_transpose`, which also rewrites the rest of the EXIF
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# EXIF's numeric types and their struct formats.
NUMBERS = {1: "B", 3: "H", 4: "I", 5: "II", 6: "b", 8: "h", 9: "i", 10: "ii", 11: "f", 12: "d"}
# TIFF tags that describe the pixel layout, and the orientation.
LAYOUT = {254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325}
LAYOUT |= {332, 334, 338, 339, 347, *range(512, 522), 529, 530, 531, 532}
KEPT_IN_PNG = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
METADATA_IN_WEBP = {b"ICCP", b"EXIF", b"XMP "}


def upright(image: Image.Image, exif: bytes = b"") -> Image.Image:
    """Return a copy of a loaded image, rotated by its EXIF orientation, or without one by its XMP.

    Args:
        exif: the EXIF that `bare` removed from the file.
    """
    found = orientation_in(exif or _exif_of(image))
    turn = TURNS.get(_orientation_in_xmp(image) if found is None else found)
    return image.copy() if turn is None else image.transpose(turn)


def _exif_of(image: Image.Image) -> bytes:
    info = image.info
    if isinstance(info.get("exif"), bytes):
        return info["exif"]
    with suppress(ValueError, AttributeError):  # ImageMagick writes hexadecimal after three lines into a PNG
        return bytes.fromhex("".join(info.get("Raw profile type exif", "").split("\n")[3:]))
    return b""


def orientation_in(exif: bytes) -> int | None:
    """Return the EXIF orientation, whatever state the other fields are in; None if it has none."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    found = None
    with suppress(struct.error, ValueError, OverflowError, ZeroDivisionError):  # truncated, or not a number
        if order is None:
            return None
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, many = struct.unpack_from(f"{order}HHI", exif, place)
            if tag == ORIENTATION and kind in NUMBERS and many:
                found = _number(exif, place + 8, order, NUMBERS[kind], many)
    return found


def _number(exif: bytes, place: int, order: str, form: str, many: int) -> int | None:
    if struct.calcsize(f"{order}{form}") * many > 4:
        (place,) = struct.unpack_from(f"{order}I", exif, place)
    value, *below = struct.unpack_from(f"{order}{form}", exif, place)
    value = value / below[0] if below else value
    return int(value) if value == int(value) else None


def _orientation_in_xmp(image: Image.Image) -> int:
    found = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
    text = found.encode("utf-8", "replace") if isinstance(found, str) else found
    match = re.search(rb'tiff:Orientation(?:="|>)([0-9])', text) if isinstance(text, bytes) else None
    return int(match[1]) if match else 1


# --- files without it -------------------------------------------------------------------------------------------


def may_be_bare(start: bytes) -> bool:
    """Whether `bare` supports a file, judged by its first 12 bytes."""
    signs = (b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"RIFF", b"II*\0", b"MM\0*")
    return start.startswith(signs) or start[4:8] == b"ftyp"


def bare(data: bytes) -> tuple[bytes, bytes] | None:
    """Strip a JPEG, PNG, WebP, TIFF, HEIC or AVIF file of its metadata; return it and its EXIF (no EXIF for the last
    three formats). None for other files, and for files without metadata."""
    try:
        if data.startswith(b"\xff\xd8"):
            found = _bare_jpeg(data)
        elif data.startswith(b"\x89PNG\r\n\x1a\n"):
            found = _bare_png(data)
        elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            found = _bare_webp(data)
        elif data[:4] in (b"II*\0", b"MM\0*"):
            found = _bare_tiff(data), b""
        elif data[4:8] == b"ftyp":  # items of these types are no longer found; all other offsets stay valid
            found = re.sub(rb"(infe.{8}(?:..)?)(?:Exif|mime)", rb"\1skip", data, flags=re.DOTALL), b""
        else:
            return None
    except (struct.error, IndexError, ValueError):
        return None
    return found if found[0] != data else None


def _bare_jpeg(data: bytes) -> tuple[bytes, bytes]:
    """Drop comments and application segments, except complete JFIF and Adobe ones, which define the colour space."""
    kept, exif, place = [data[:2]], b"", 2
    while data[place] == 0xFF and data[place + 1] != 0xDA:
        if data[place + 1] == 0xFF:  # padding before a marker
            place += 1
            continue
        kind, (size,) = data[place + 1], struct.unpack_from(">H", data, place + 2)
        segment = data[place : place + 2 + size]
        if kind == 0xE1 and segment[4:10] == b"Exif\0\0":
            exif = exif or segment[4:]
        colours = size >= {0xE0: 16, 0xEE: 14}.get(kind, 2**16)
        if colours or not (0xE0 <= kind <= 0xEF or kind == 0xFE):
            kept.append(segment)
        place += 2 + size
    return b"".join([*kept, data[place:]]), exif


def _bare_png(data: bytes) -> tuple[bytes, bytes]:
    kept, exif, place = [data[:8]], b"", 8
    colours, palette = data[25], 0
    while place + 12 <= len(data):
        (size,) = struct.unpack_from(">I", data, place)
        kind, whole = data[place + 4 : place + 8], data[place : place + 12 + size]
        if kind == b"PLTE":
            palette = size // 3
        if kind == b"eXIf":
            exif = exif or whole[8:-4]
        fits = kind != b"tRNS" or (size <= palette if colours == 3 else size == {0: 2, 2: 6}.get(colours))
        if kind in KEPT_IN_PNG and fits:
            kept.append(whole)
        place += 12 + size
    return b"".join(kept), exif


def _bare_webp(data: bytes) -> tuple[bytes, bytes]:
    kept, exif = [], b""
    for kind, body in _chunks(data, 12):
        if kind == b"EXIF":
            exif = exif or body
        if kind == b"VP8X":
            body = bytes([body[0] & ~0b101100]) + body[1:]  # no ICC, EXIF or XMP
        if kind not in METADATA_IN_WEBP:
            kept.append(kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2))
    whole = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(whole)) + whole, exif


def _chunks(data: bytes, place: int) -> Iterator[tuple[bytes, bytes]]:
    while place + 8 <= len(data):
        (size,) = struct.unpack_from("<I", data, place + 4)
        yield data[place : place + 4], data[place + 8 : place + 8 + size]
        place += 8 + size + size % 2


def _bare_tiff(data: bytes) -> bytes:
    """Keep only the first image, with the tags that describe its pixel layout."""
    order = "<" if data.startswith(b"II") else ">"
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    entries = [data[place : place + 12] for place in range(start + 2, start + 2 + 12 * count, 12)]
    kept = [entry for entry in entries if len(entry) == 12 and struct.unpack(f"{order}H", entry[:2])[0] in LAYOUT]
    table = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    return data[:start] + table + data[start + len(table) :]
