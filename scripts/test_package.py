"""Build sdist and wheel, install the wheel into an empty environment, and use it there. Run by `make test-package`.

python scripts/test_package.py [--keep FOLDER]     FOLDER: keep both files there
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEEL = (  # what it must contain besides the modules
    *("tinyclip/py.typed", "tinyclip/vocabulary/clip_merges.txt.xz", "tinyclip/models/emoji-student/model.safetensors"),
    *("tinyclip/models/emoji-student/README.md", "licenses/LICENSE", "licenses/NOTICE", "entry_points.txt"),
)
# Reads the metadata as the Python Package Index does.
METADATA = """
import sys
from packaging.metadata import Metadata
found = Metadata.from_email(sys.stdin.buffer.read(), validate=True)
assert found.description_content_type.startswith("text/markdown"), found.description_content_type
assert found.license_expression == "MIT" and found.classifiers and found.project_urls and found.keywords
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path)
    keep = parser.parse_args().keep
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        tools = environment(place / "tools", "build")
        run(tools / "python", "-m", "build", "--outdir", place / "dist", ROOT, env=constrained())
        (wheel,), (sdist,) = (place / "dist").glob("*.whl"), (place / "dist").glob("*.tar.gz")
        check_wheel(wheel, tools / "python")
        check_sdist(sdist)
        began = time.perf_counter()
        use(environment(place / "fresh", str(wheel)), place)
        seconds = time.perf_counter() - began
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB; installed and used in {seconds:.0f} s")
        if keep:
            shutil.copytree(place / "dist", keep, dirs_exist_ok=True)


def check_wheel(wheel: Path, python: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        subprocess.run([python, "-c", METADATA], input=archive.read(metadata), check=True)
    for wanted in WHEEL:
        assert any(name.endswith(wanted) for name in names), f"{wheel.name} lacks {wanted}"
    modules = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src/tinyclip").rglob("*.py")}
    assert modules <= set(names), f"{wheel.name} lacks {modules - set(names)}"
    other = [name for name in names if not name.startswith(("tinyclip/", "tinyclip-"))]
    assert not other, f"{wheel.name} has {other}"


def check_sdist(sdist: Path) -> None:
    """Check that it contains everything tracked, including the tests and their files."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True)
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}  # empty without git
    assert tracked <= names, f"{sdist.name} lacks {sorted(tracked - names)[:10]}"
    extra = [name for name in names if name.endswith((".pyc", ".tar", ".tar.idx"))]
    assert not extra, f"{sdist.name} has {extra[:10]}"


def use(binaries: Path, place: Path) -> None:
    """Run a new user's commands in an empty folder."""
    empty = place / "empty"
    empty.mkdir()
    picture = red_apple(empty)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"TINYCLIP_CACHE": str(empty / "cache"), "HOME": str(empty)}

    def tinyclip(*arguments: str) -> str:
        return run(binaries / "tinyclip", *arguments, env=environment, cwd=empty)

    assert "classify" in tinyclip("--help")
    assert "emoji-student" in tinyclip("zoo")
    assert json.loads(tinyclip("doctor", "--json"))["problems"] == []
    said = tinyclip("classify", "emoji-student", picture.name, "a bicycle", "a red apple", "a dog", "--json")
    best = json.loads(said)["labels"][0]
    assert best["label"] == "a red apple", said
    code = (
        "import tinyclip; print(tinyclip.__file__, tinyclip.load('emoji-student').classify('apple.webp', ['a', 'b']))"
    )
    assert str(binaries.parent) in run(binaries / "python", "-c", code, env=environment, cwd=empty)


def red_apple(folder: Path) -> Path:
    """Return a drawing that no model was trained on."""
    with tarfile.open(ROOT / "assets/emoji/eval/shard-00000.tar.gz") as shard:
        members = {member.name: member for member in shard}
        for name, member in members.items():
            if name.endswith(".json") and json.load(shard.extractfile(member) or sys.stdin).get("class") == "red apple":
                data = shard.extractfile(members[name.replace(".json", ".webp")])
                assert data is not None
                (folder / "apple.webp").write_bytes(data.read())
    return folder / "apple.webp"


def environment(folder: Path, what: str) -> Path:
    """Return the `bin` folder of a new virtual environment with `what` installed."""
    venv.create(folder, with_pip=True)
    options = ("--quiet", "--disable-pip-version-check", "--constraint", str(ROOT / "constraints.txt"))
    run(folder / "bin" / "python", "-m", "pip", "install", *options, what)
    return folder / "bin"


def constrained() -> dict[str, str]:
    """Return an environment that also pins the build requirements."""
    return os.environ | {"PIP_CONSTRAINT": str(ROOT / "constraints.txt")}


def run(*command: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, cwd=cwd)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
