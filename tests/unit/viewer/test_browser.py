"""The viewer in a real browser: it shows the run's numbers, filters, keeps hostile text as text, and stays quick."""

import asyncio
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts import cli
from scripts.viewer.server import serve
from scripts.viewer.source import RunSource
from tests.support.paths import ROOT
from tests.support.shown_run import HOSTILE, ShownRun
from trace_async.trees.tree import Node, Rollout, RolloutTree
from trace_async.types import Task

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install trace-async[dev]")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]

PRINTABLE_HOSTILE = HOSTILE.replace("\x1b", "\\x1b").replace("\x07", "\\x07").replace("\u202e", "\\u202e")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that fails its test when a script of it fails or its content policy is broken."""
    page = browser.new_page(viewport={"width": 1400, "height": 850})
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    yield page
    page.close()
    assert not wrong


@pytest.fixture
def shown(tmp_path: Path) -> ShownRun:
    run = ShownRun(tmp_path)
    run.write(1, [run.lost("q1"), run.lost("q2")])
    run.write(3, [run.lost("q3", "2-hop"), run.tree("q7")])
    run.write_curves([0.25, 0.5, 0.8125])
    return run


def open_file(page: Any, run: ShownRun, address: str = "") -> None:
    file = run.directory / "page.html"
    assert cli.main(["tree", str(run.directory), "--html", str(file)]) == 0
    page.goto(file.as_uri() + address)
    page.wait_for_selector(".row")


def expect_address(page: Any, address: str) -> None:
    playwright.expect(page).to_have_url(re.compile(re.escape(address) + "$"))


def facts(page: Any) -> dict[str, str]:
    names, values = page.locator(".facts dt").all_inner_texts(), page.locator(".facts dd").all_inner_texts()
    return dict(zip(names, values, strict=True))


def tasks(page: Any) -> list[str]:
    return page.locator(".row b").all_inner_texts()


def test_its_numbers_are_the_runs(page: Any, shown: ShownRun) -> None:
    open_file(page, shown)
    # The first tree with both outcomes, at its prompt.
    expect_address(page, "#u=3&t=1&n=0")
    assert facts(page) == {
        "V before → after": "0.25 → 0.33",
        "leaves that succeeded": "1 of 3",
        "allocated": "2 roots, 1 continuations",
        "tokens": "10 generated, 17 in the tree",
        "policy at its start": "version 6",
        "lost: timeout": "2",
        "broke down: step.env": f"3 times, such as: no server{PRINTABLE_HOSTILE}",
    }
    page.keyboard.press("2")  # to the end of rollout 2, the continuation
    # `trace`: the branch term 1 − 0 with weight 1/(m·K) = 1/2, on the continuation's own turns.
    assert facts(page) == {
        "V before → after": "– → 1.00",
        "leaves that succeeded": "1 of 1",
        "advantage per token": "+0.500",
        "generated tokens": "2, mean log p -0.50",
        "policy versions": "7",
        "prefill from cache": "8 of 10 tokens, 80 %",
        "reward": "✓ 1",
        "f1": "0.75",
    }
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    expect_address(page, "#u=3&t=1&n=1")
    assert "bought 1 continuation here: the rollout that passed ended with 0" in page.locator(".why").inner_text()
    assert page.locator("#turns .turn.here .token").all_inner_texts() == ["search", " ada"]


def test_it_filters_searches_and_is_moved_through_by_keys(page: Any, shown: ShownRun) -> None:
    open_file(page, shown)
    assert tasks(page) == ["q3", "q7", "q1", "q2"]
    page.select_option("#outcome", "both")
    assert tasks(page) == ["q7"]
    page.select_option("#outcome", "")
    page.select_option("#kind", "2-hop")
    assert tasks(page) == ["q3", "q7"]
    page.select_option("#kind", "")
    page.select_option("#update", "1")
    assert tasks(page) == ["q1", "q2"]
    page.select_option("#update", "")
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    page.keyboard.type("Found ADA")
    assert tasks(page) == ["q7"]
    assert page.locator("#count").inner_text() == "1 of 4 trees"
    page.keyboard.press("Enter")
    page.keyboard.press("n")
    expect_address(page, "#u=3&t=1&n=4")
    page.fill("#search", "")
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    expect_address(page, "#u=1&t=0&n=0")
    page.keyboard.press("]")
    expect_address(page, "#u=3&t=0&n=0")
    page.locator(".row", has_text="q2").click()
    expect_address(page, "#u=1&t=1&n=0")


def test_an_address_leads_to_its_node(page: Any, shown: ShownRun) -> None:
    open_file(page, shown, "#u=3&t=1&n=4")
    assert page.locator("#detail h2").inner_text() == "turn 2, continuation 2"
    assert facts(page)["V before → after"] == "0.88 → 1.00"


def test_a_click_on_a_node_chooses_it(page: Any, shown: ShownRun) -> None:
    open_file(page, shown, "#u=3&t=1&n=0")
    box = page.locator("#drawing").bounding_box()
    x = box["x"] + 30 + 2 * 58 * 1.4  # the second turn: margin, width of a column, the largest scale of a small tree
    for y in range(-80, 80, 8):
        page.mouse.move(x, box["y"] + box["height"] / 2 + y)
        if "turn 2, rollout 0" in (page.locator("#tip").text_content() or ""):
            page.mouse.click(x, box["y"] + box["height"] / 2 + y)
            expect_address(page, "#u=3&t=1&n=2")
            return
    raise AssertionError("turn 2 of rollout 0 is nowhere in sight")


def test_the_runs_curves_stand_beside_its_trees(page: Any, shown: ShownRun) -> None:
    open_file(page, shown)
    page.keyboard.press("c")
    chart = page.locator(".chart")
    assert (chart.locator("span").inner_text(), chart.locator("b").inner_text()) == ("train/reward", "0.8125")
    page.locator(".row", has_text="q1").click()
    assert chart.locator("b").inner_text() == "0.25"
    page.fill("#curve-search", "nothing like it")
    assert page.locator("#charts").inner_text() == "no figures of that name"


def test_hostile_text_stays_text(page: Any, tmp_path: Path) -> None:
    run = ShownRun(tmp_path, name="run")
    run.write(1, [run.tree(f"q{HOSTILE}", said=f"answer {HOSTILE}", kind=HOSTILE)])
    run.write_curves([1.0], name=f"train/reward{HOSTILE}")
    open_file(page, run, "#u=1&t=0&n=2")
    page.keyboard.press("c")
    assert page.title() == "run"
    assert page.locator("script").count() == 2  # the data and the page's own
    assert page.locator("img").count() == 0
    assert page.locator(".turn.here pre").inner_text() == f"answer {PRINTABLE_HOSTILE}"
    assert page.locator(".row b").inner_text() == f"q{PRINTABLE_HOSTILE}"


def test_the_browser_itself_refuses_to_read_text_as_markup(browser: Any, shown: ShownRun) -> None:
    page = browser.new_page()
    open_file(page, shown)
    with pytest.raises(playwright.Error, match="TrustedHTML"):
        page.evaluate("document.body.innerHTML = '<b>x</b>'")
    page.close()


def test_ten_thousand_turns_are_drawn_only_where_they_are_in_sight(page: Any, tmp_path: Path) -> None:
    run = ShownRun(tmp_path)
    nodes = [Node(parent=-1, rollout=-1, token_ids=run.ids("who"), num_generated=0, value=0.5)]
    rollouts = []
    for number in range(500):
        for depth in range(20):
            nodes.append(run.turn(len(nodes) - 1 if depth else 0, number, "answer it", value=0.5))
        rollouts.append(Rollout(kind="root", anchor=0, leaf=len(nodes) - 1, reward=float(number % 2)))
    task = Task(id="wide", domain="d", kind="k", data={})
    run.write(1, [RolloutTree(task=task, nodes=tuple(nodes), rollouts=tuple(rollouts))])
    open_file(page, run)
    drawing = page.locator("#drawing")
    playwright.expect(drawing).to_have_attribute("data-drawn", re.compile(r"^[1-4]?\d{3}$"))  # 100 to 4999 of 10,001
    page.goto(page.url.partition("#")[0] + "#u=1&t=0&n=10000")
    playwright.expect(page.locator("#detail h2")).to_have_text("turn 20, rollout 499")
    for _ in range(6):
        page.keyboard.press("+")
    playwright.expect(drawing).to_have_attribute("data-drawn", re.compile(r"^[1-4]?\d\d$"))


def test_a_served_page_follows_the_run(page: Any, shown: ShownRun) -> None:
    with served(RunSource(shown.directory)) as url:
        page.goto(url)
        playwright.expect(page.locator(".row")).to_have_count(4, timeout=60_000)
        assert page.locator("#live").is_visible()
        shown.write(4, [shown.tree("q9")])
        playwright.expect(page.locator(".row")).to_have_count(5, timeout=60_000)
        assert tasks(page)[0] == "q9"
        expect_address(page, "#u=3&t=1&n=0")  # what was being looked at stays


class served:
    """The server in a thread of its own, with an event loop: Playwright's synchronous driver occupies this one's."""

    def __init__(self, source: RunSource) -> None:
        self._source = source
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        self._runner = asyncio.run_coroutine_threadsafe(serve(self._source, 0), self._loop).result(30)
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}/"

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)


def test_pictures_for_the_documentation_are_made_by_a_script(shown: ShownRun, tmp_path: Path):
    command = [sys.executable, "-m", "scripts.viewer.screenshots", str(shown.directory), str(tmp_path)]
    subprocess.run([*command, "--only", "terminal,trees"], check=True, cwd=ROOT)
    for name in ("terminal", "trees"):
        picture = (tmp_path / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 5_000  # an empty page of this size takes less
