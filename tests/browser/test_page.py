"""`tinyclip app` as visitors see it: in a headless Chromium ($CHROMIUM, or the one on PATH)."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.browser.clients import COMMAND, start, stop

ROOT = Path(__file__).parent.parent.parent
expect.set_options(timeout=60_000)  # a busy machine classifies slowly
TEACHER = ROOT / "assets" / "emoji-teacher"
APPLE = "twemoji-1f34f.webp"
NAMES = (APPLE, "twemoji-1f436.webp", "twemoji-1f431.webp", "twemoji-1f34b.webp")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("app")
    with tarfile.open(ROOT / "assets" / "emoji" / "eval" / "shard-00000.tar.gz") as shard:
        for name in NAMES:
            shard.extract(name, place / "pictures", filter="data")
    subprocess.run([*COMMAND, "index", TEACHER, place / "pictures", "-o", place / "index"], check=True, timeout=120)
    return place / "index"


@pytest.fixture(scope="module")
def address(index: Path) -> Iterator[str]:
    process, address = start(TEACHER, "--index", index, "--student", "emoji-student")
    yield address
    stop(process)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert program, "no chromium on the path; install it, or set CHROMIUM to its program"
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, browser: Browser, address: str) -> Iterator[Page]:
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="dark")
    elsewhere: list[str] = []
    page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else elsewhere.append(r.url))
    page.goto(address)
    expect(page.get_by_role("button", name="Classify")).to_be_visible()
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
    assert not elsewhere


def give(page: Page, file: Path) -> None:
    page.locator("input[type=file]:visible, [role=tabpanel]:visible input[type=file]").first.set_input_files(file)
    expect(page.get_by_role("img", name="The chosen picture").locator("visible=true")).to_be_visible()


def test_a_picture_is_classified(page: Page, index: Path) -> None:
    give(page, index.parent / "pictures" / APPLE)
    page.get_by_label("Labels").fill("a dog, a green apple\n<b>${1+1}{{7}}</b>")
    page.get_by_role("button", name="Classify").press("Enter")
    result = page.get_by_role("region", name="Probabilities, emoji-teacher")
    expect(result.get_by_role("listitem")).to_have_count(3)
    expect(result.get_by_role("listitem").first).to_contain_text("a green apple")
    expect(result).to_contain_text("<b>${1+1}{{7}}</b>")


def test_the_index_is_searched_by_words_and_by_picture(page: Page, index: Path) -> None:
    page.get_by_role("tab", name="Search").click()
    page.get_by_label("Words").fill("a green apple")
    page.get_by_label("Words").press("Enter")
    found = page.get_by_role("region", name="Found for “a green apple”").get_by_role("img")
    expect(found).to_have_count(len(NAMES))
    assert found.first.get_attribute("alt") == APPLE
    assert found.first.get_attribute("src", timeout=60_000).startswith("data:image/webp;base64,")  # type: ignore[union-attr]
    give(page, index.parent / "pictures" / NAMES[1])
    page.get_by_role("button", name="Search by picture").click()
    like = page.get_by_role("region", name="Found for a picture like this")
    expect(like.get_by_role("img").first).to_have_attribute("alt", NAMES[1])
    expect(like.get_by_role("listitem").first).to_contain_text("1.000")


def test_teacher_and_student_are_compared(page: Page, index: Path) -> None:
    page.get_by_role("tab", name="Compare").click()
    give(page, index.parent / "pictures" / APPLE)
    page.get_by_role("button", name="Compare").click()
    for name in ("emoji-teacher", "emoji-student"):
        result = page.get_by_role("region", name=f"Probabilities, {name}")
        expect(result).to_contain_text(re.compile(r"[\d.]+ ms for the picture, [\d.]+ ms for 3 labels"))
        expect(result.get_by_role("listitem")).to_have_count(3)


def test_mistakes_are_told(page: Page, tmp_path: Path) -> None:
    classify = page.get_by_role("button", name="Classify")
    classify.click()
    expect(page.get_by_text("No picture: choose one first.")).to_be_visible()
    page.get_by_label("Labels").fill("\n".join(f"label {i}" for i in range(2000)))
    classify.click()
    expect(page.get_by_text("2,000 labels are too many, 200 at most.")).to_be_visible()
    page.get_by_label("Labels").fill(" , ")
    classify.click()
    expect(page.get_by_text("No labels: type some")).to_be_visible()
    words = tmp_path / "words.png"
    words.write_text("no picture")
    page.locator("input[type=file]").first.set_input_files(words)
    page.get_by_label("Labels").fill("a dog")
    expect(page.get_by_role("button", name="Remove Image")).to_be_visible()
    classify.click()
    expect(page.get_by_text("not a picture that Pillow can read")).to_be_visible()


def test_the_keyboard_reaches_everything(page: Page) -> None:
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        name = "e => e.innerText || e.labels?.[0]?.innerText || e.getAttribute('aria-label') || e.title || ''"
        reached.add(page.evaluate(f"({name})(document.activeElement)").split("\n")[0].strip())
    assert {"Classify", "Labels"} <= reached, reached


def test_the_page_opens_with_a_token(browser: Browser, index: Path) -> None:
    process, address = start("emoji-student", "--host", "0.0.0.0")
    page = browser.new_page()
    page.goto(address)
    give(page, index.parent / "pictures" / APPLE)
    page.get_by_role("button", name="Classify").click()
    expect(page.get_by_role("region").get_by_role("listitem")).to_have_count(3)
    assert "token" not in page.url
    stop(process)
    page.close()


def test_tabs_without_input_are_not_there_and_it_ends_with_ctrl_c(browser: Browser) -> None:
    process, address = start("emoji-student", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    page = browser.new_page()
    page.goto(address)
    expect(page.get_by_role("tab")).to_have_text(["Classify"])
    stop(process)  # with a page open
    page.close()


def test_an_index_of_another_model_is_refused(index: Path) -> None:
    command = [*COMMAND, "app", "emoji-student", "--index", str(index), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "was made with another model" in done.stderr
