"""Real-world tables: each row is read whole or reported, never cut off, and never absorbs the next."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.helpers.commands import tinyclip
from tests.helpers.shards import picture
from tinyclip.data import tables
from tinyclip.data.captioned import Item
from tinyclip.data.datasets import open_dataset
from tinyclip.data.pack import find_items, pack
from tinyclip.data.samples import captions_of
from tinyclip.data.shards import read_shards
from tinyclip.search.sources import open_source

HEADER = "filepath,caption\n"


def items_of(folder: Path, text: str | bytes, name: str = "t.csv", **options: Any) -> list[Item]:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return find_items(folder / name, **options)


def found(folder: Path, text: str | bytes, name: str = "t.csv", **options: Any) -> dict[str, list[str]]:
    """Return captions by picture, and for each unusable row the reason by its position."""
    return {
        item.path.name: [f"! {item.problem}"] if item.problem else list(item.captions)
        for item in items_of(folder, text, name, **options)
    }


def rows(separator: str, count: int = 4) -> str:
    return "".join(f"{i}.jpg{separator}picture {i}\n" for i in range(count))


GOOD = {f"{i}.jpg": [f"picture {i}"] for i in range(4)}


def test_a_caption_with_commas_and_no_quotes_is_whole(tmp_path: Path) -> None:
    text = HEADER + '0.jpg,a cat, on a mat\n1.jpg,"a cat", on "a, mat"\n2.jpg,"one, ""two"""\n3.jpg,a dog,,\n'
    assert found(tmp_path, text) == {
        "0.jpg": ["a cat, on a mat"],
        "1.jpg": ['"a cat", on "a, mat"'],
        "2.jpg": ['one, "two"'],
        "3.jpg": ["a dog"],
    }


@pytest.mark.parametrize(
    ("header", "row"), [("caption,filepath", "a cat, a dog,0.jpg"), ("id,path,text", "0,0.jpg,a,b")]
)
def test_commas_that_could_be_anywhere_are_a_bad_row(tmp_path: Path, header: str, row: str) -> None:
    good = "fine,1.jpg\nfine,2.jpg\n" if header.startswith("caption") else "1,1.jpg,fine\n2,2.jpg,fine\n"
    fields = row.count(",") + 1
    assert found(tmp_path, f"{header}\n{row}\n{good}") == {
        "1.jpg": ["fine"],
        "2.jpg": ["fine"],
        "t.csv, line 2": [f"! {fields} fields separated by ',', but the header has {header.count(',') + 1}"],
    }


def test_quotes_of_a_tsv_are_text(tmp_path: Path) -> None:
    texts = ['"open, a film', "a dog", '5" screen', '"closed" quote', '"all of it"', 'say ""hi""']
    text = "filepath\tcaption\n" + "".join(f"{i}.jpg\t{one}\n" for i, one in enumerate(texts))
    assert found(tmp_path, text, "t.tsv") == {f"{i}.jpg": [one] for i, one in enumerate(texts)}


def test_a_tsv_with_a_title_in_quotes_keeps_them(tmp_path: Path) -> None:
    text = 'filepath\tcaption\n0.jpg\t"Hello"\n1.jpg\ta dog\n'
    assert found(tmp_path, text, "t.tsv") == {"0.jpg": ['"Hello"'], "1.jpg": ["a dog"]}


def test_a_tsv_of_excel_is_unquoted(tmp_path: Path) -> None:
    text = 'filepath\tcaption\n0.jpg\t"say ""hi"""\n1.jpg\t"two\nlines"\n2.jpg\t"""all"""\n3.jpg\tplain\n'
    assert found(tmp_path, text, "t.tsv") == {
        "0.jpg": ['say "hi"'],
        "1.jpg": ["two\nlines"],
        "2.jpg": ['"all"'],
        "3.jpg": ["plain"],
    }


def test_a_quote_that_nothing_closes_costs_its_own_row(tmp_path: Path) -> None:
    text = (
        HEADER
        + '0.jpg,"never closed\n1.jpg,a dog\n2.jpg,a screen of 5"\n3.jpg,"two\nlines, and more"\n4.jpg,"to the end\n'
    )
    bad = ["! a quote is not closed"]
    assert found(tmp_path, text) == {
        "1.jpg": ["a dog"],
        "2.jpg": ['a screen of 5"'],
        "3.jpg": ["two\nlines, and more"],
        "t.csv, line 2": bad,
        "t.csv, line 7": bad,
    }


def test_ragged_and_cut_rows_are_named(tmp_path: Path) -> None:
    text = "filepath,width,caption\n\n0.jpg,10,zero\n1.jpg,ten\n  \n2.jpg,10,two\n3.jpg,10,a\0b\n,10,no picture\n"
    assert found(tmp_path, text + "4.jpg,1,4\n5.jpg,1,5\n6.jpg,6,6\n7.jp") == {
        "0.jpg": ["zero"],
        "2.jpg": ["two"],
        "4.jpg": ["4"],
        "5.jpg": ["5"],
        "6.jpg": ["6"],
        "t.csv, line 4": ["! 2 fields separated by ',', but the header has 3"],
        "t.csv, line 7": ["! NUL bytes"],
        "t.csv, line 8": ["! no picture in filepath"],
        "t.csv, line 12": ["! 1 fields separated by ',', but the header has 3"],
    }


def test_more_bad_rows_than_good_ones_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"t\.csv: 2 of its 3 rows cannot be read, the first: t\.csv, line 2: 1 fields"
    ):
        items_of(tmp_path, HEADER + "a\nb\n0.jpg,c\n")


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_separators_are_recognised(tmp_path: Path, name: str, separator: str) -> None:
    for space in ("", " "):
        text = f"\ufeffFilepath{space}{separator}{space}CAPTION{space}\r\n" + rows(separator + space).replace(
            "\n", "\r\n"
        )
        assert found(tmp_path, text, name) == GOOD
    assert found(tmp_path, f"sep={separator}\nfilepath{separator}caption\n" + rows(separator), name) == GOOD


def test_a_separator_can_be_given(tmp_path: Path) -> None:
    assert found(tmp_path, "filepath^caption\n" + rows("^"), separator="^") == GOOD
    assert found(tmp_path, "wo\twas\n" + rows("\t"), image_column="wo", caption_column="was") == GOOD
    with pytest.raises(ValueError, match="separator 'ab': give one character, or tab"):
        items_of(tmp_path, HEADER, separator="ab")
    with pytest.raises(ValueError, match="2 columns are named 'caption'; rename the others"):
        items_of(tmp_path, "filepath,caption,caption\n0.jpg,a,b\n")


def test_fields_of_any_length(tmp_path: Path) -> None:
    long = "word " * 40_000
    assert found(tmp_path, HEADER + f'0.jpg,{long}\n1.jpg,"{long}, {long}"\n2.jpg,a dog\n') == {
        "0.jpg": [long.strip()],
        "1.jpg": [f"{long}, {long}".strip()],
        "2.jpg": ["a dog"],
    }


def test_lines_of_json(tmp_path: Path) -> None:
    lines = [
        '\ufeff{"file": "0.jpg"}',
        '{"file": "1.jpg", "caption": "a\u2028b\u0085c"}',
        "",
        '{"file": "2.jpg", "caption": ["c", "d"]}',
        "[1]",
        '{"caption": "e"}',
        '{"file": "3.jpg", "caption": 12}',
        '{"file": {"bytes": 3}, "caption": "f"}',
        *(json.dumps({"file": f"{i}.jpg", "caption": "g"}) for i in range(4, 9)),
        '{"file": "9.jpg", "capt',
    ]
    result = found(tmp_path, "\n".join(lines), "t.jsonl")
    assert result == {
        "0.jpg": [],
        "1.jpg": ["a\u2028b\u0085c"],
        "2.jpg": ["c", "d"],
        "3.jpg": ["! caption is int, not text"],
        **{f"{i}.jpg": ["g"] for i in range(4, 9)},
        "t.jsonl, line 5": ["! JSON list, not an object"],
        "t.jsonl, line 6": ["! no picture in file"],
        "t.jsonl, line 8": ["! no picture in file"],
        "t.jsonl, line 14": result["t.jsonl, line 14"],
    }
    assert "not complete JSON" in result["t.jsonl, line 14"][0]


def test_utf_16_is_named(tmp_path: Path) -> None:
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        with pytest.raises(ValueError, match=r"t\.csv: UTF-16; save it as UTF-8"):
            items_of(tmp_path, (HEADER + rows(",")).encode(encoding))


def test_bad_rows_are_counted_and_listed(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i))
    (tmp_path / "t.jsonl").write_text('{"file": "0.jpg", "text": "a"}\n{"file": "1.jpg", "text": "b"}\n{"file": "2.j')
    output = tinyclip("data", "pack", tmp_path / "t.jsonl", tmp_path / "out")
    assert "packed 2 pictures" in output and "bad_row" in output and "t.jsonl, line 3" in output
    assert [captions_of(s) for s in read_shards(tmp_path / "out")] == [["a"], ["b"]]
    dataset = open_dataset(tmp_path / "t.jsonl")
    assert len(list(dataset)) == 2 and [s.cause for s in dataset.skipped] == ["bad_row"]
    source = open_source(tmp_path / "t.jsonl")
    assert [text.caption for text in source.parts[0]] == ["a", "b"]
    assert [(s.key, s.cause) for s in source.skipped] == [("t.jsonl, line 3", "bad_row")]


# --- embedded pictures ------------------------------------------------------------------------------------------


def with_pictures(path: Path, count: int, **columns: Any) -> list[bytes]:
    data = [picture(i, ("jpg", "png", "webp")[i % 3]) for i in range(count)]
    inside = [{"bytes": one, "path": f"{i}.jpg" if i % 2 else None} for i, one in enumerate(data)]
    table = {"image": inside, "caption": [f"caption {i}" for i in range(count)]} | columns
    pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=50)
    return data


def test_pictures_inside_a_parquet_are_packed_as_they_are(tmp_path: Path) -> None:
    data = with_pictures(tmp_path / "t.parquet", 150)
    report = pack(find_items(tmp_path / "t.parquet"), tmp_path / "out")
    samples = list(read_shards(tmp_path / "out"))
    assert report.packed == 150 and not report.skipped
    assert [captions_of(s) for s in samples] == [[f"caption {i}"] for i in range(150)]
    endings = ["jpg", "png", "webp"]
    assert all(sample[endings[i % 3]] == data[i] for i, sample in enumerate(samples))
    dataset = open_dataset(tmp_path / "t.parquet")
    assert [example.captions for example in dataset] == [(f"caption {i}",) for i in range(150)]


def test_plain_bytes_and_broken_ones(tmp_path: Path) -> None:
    plain = [picture(0), b"\x00\xffjunk", None, picture(1), picture(2)]
    with_pictures(tmp_path / "t.parquet", 5, image=plain)
    report = pack(find_items(tmp_path / "t.parquet"), tmp_path / "out", resize=10)
    assert report.packed == 3
    assert [(Path(s.key).name, s.cause) for s in report.skipped] == [
        ("t.parquet, row 2", "corrupt_image"),
        ("t.parquet, row 3", "bad_row"),
    ]
    assert not any("\\x" in s.reason for s in report.skipped)


def test_embed_takes_pictures_inside_for_pictures(tmp_path: Path) -> None:
    with_pictures(tmp_path / "t.parquet", 5)
    source = open_source(tmp_path / "t.parquet", part_size=2)
    assert source.kind == "rows" and [len(part) for part in source.parts] == [2, 2, 1]
    assert [number for part in source.parts for number, *_ in part] == [1, 2, 3, 4, 5]
    result = json.loads(tinyclip("embed", "emoji-student", tmp_path / "t.parquet", "-o", tmp_path / "out", "--json"))
    assert (result["what"], result["images"], result["texts"], result["skipped"]) == ("both", 5, 5, 0)
    keys = pyarrow.parquet.read_table(tmp_path / "out" / "image-00000.parquet")["key"].to_pylist()
    assert keys == ["1", "2", "3", "4", "5"]


def test_pictures_inside_are_found_again_in_any_order(tmp_path: Path) -> None:
    data = with_pictures(tmp_path / "t.parquet", 150)
    inside = tables.Pictures(tables.open_table(tmp_path / "t.parquet"), "image")
    for number in (140, 141, 3, 2, 149, 150, 1):
        assert inside.read(number) == data[number - 1]


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    result = found(tmp_path, HEADER.encode() + b"caf\xe9.jpg,a\n1.jpg,caf\xe9\n2.jpg,b\n")
    assert result == {os.fsdecode(b"caf\xe9.jpg"): ["a"], "1.jpg": ["! caption is not UTF-8"], "2.jpg": ["b"]}


@pytest.mark.parametrize("first", [1, 2, 3, 4, 6, 7, 8])
def test_rows_of_a_parquet_from_any_on(tmp_path: Path, first: int) -> None:
    """In row groups of 3."""
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": list(range(1, 8)), "b": list("abcdefg")}), path, row_group_size=3)
    rows = list(tables.parquet_rows(path, ["a"], first))
    assert [(row.number, row.fields) for row in rows] == [(i, {"a": i}) for i in range(first, 8)]
