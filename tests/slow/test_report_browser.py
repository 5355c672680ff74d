"""The report in a real browser, clicked through. Needs playwright and Chromium: `make .venv/.stamp-browser`."""

from pathlib import Path

import pytest
import screenshots
from report_runs import HOSTILE, rollout, rollouts, write_evaluation, write_state

from trl_cmdp.reports import read_runs, write_report


pytestmark = pytest.mark.slow

COMPARISON = Path(__file__).parents[2] / "benchmarks" / "results" / "nested"
DESKTOP, PHONE = screenshots.VIEWPORTS["desktop"], screenshots.VIEWPORTS["phone"]
CONTRAST = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const luminance = (colour) => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)
      .map((part) => part / 255).map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (one, other) => {
    const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  };
  const paper = getComputedStyle(document.body).backgroundColor;
  const shown = (element) => {
    const {color, backgroundColor} = getComputedStyle(element);
    return contrast(color, backgroundColor === "rgba(0, 0, 0, 0)" ? paper : backgroundColor);
  };
  return [...document.querySelectorAll(".legend .token, p, th, td, a, .interval, .mark-sample")].map(shown);
}
"""


@pytest.fixture(scope="module")
def browser():
    with screenshots.chromium() as launched:
        yield launched


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    # Of the second student's first problem, the completion is markup.
    hostile = rollout(0, 0, [2.0, 0.1], tokens=[HOSTILE, "\n"])
    runs = [
        write_evaluation(folder / "a", rollouts(0.3)),
        write_evaluation(folder / "b", [hostile, *rollouts(3)[1:]], "grpo"),
        write_state(folder / "run" / "checkpoint-12"),
        COMPARISON,
    ]
    return write_report(read_runs(runs), folder / "out")[0].as_uri()


class Watch:
    """What a page did that it should not."""

    def __init__(self, page, url):
        self.problems = []
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("console", lambda message: self.problems.append(f"console: {message.text}"))
        page.on("dialog", lambda dialog: (self.problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: request.url.split("#")[0] == url or self.problems.append(request.url))


@pytest.fixture
def page(browser, url):
    context = browser.new_context(viewport=DESKTOP)
    page = context.new_page()
    watch = Watch(page, url)
    page.goto(url)
    yield page
    context.close()
    assert watch.problems == []


def test_filters_narrow_the_list(page):
    rows = page.locator("#list [role=option]")
    assert rows.count() == 24
    page.select_option("#student", label="grpo")
    assert rows.count() == 12
    page.select_option("#budget", label="exceeded")
    assert page.locator("#count").inner_text() == "11 of 24 rollouts"  # all but the second one of problem 0
    page.select_option("#outcome", label="wrong")
    assert {row.split("\n")[0] for row in rows.all_inner_texts()} == {"wrong"}
    page.click("text=Reset")
    assert rows.count() == 24
    page.fill("#search", "5 + 1")
    assert rows.count() == 4
    page.fill("#search", "no such text")
    assert page.locator("#detail").inner_text() == "No rollout matches."


def test_the_order_is_by_cost(page):
    page.select_option("#sort", label="most costly first")
    costs = [float(text.split()[0]) for text in page.locator("#list .cost").all_inner_texts()]
    assert costs == sorted(costs, reverse=True)
    assert page.locator("#list [aria-selected=true]").get_attribute("id") == page.locator(
        "#list li"
    ).first.get_attribute("id")


def test_tokens_are_shaded_by_cost_and_the_first_over_the_limit_is_marked(page):
    page.select_option("#student", label="grpo")
    page.locator("#list li").nth(2).click()  # problem 1: 0.15, 0.75, 0.02
    tokens = page.locator("#detail .token")
    assert tokens.all_inner_texts() == ["t0 ", "t1 ", "t2 "]
    assert [tokens.nth(place).get_attribute("class") for place in range(3)] == [
        "token shade-3",
        "token shade-4 first",
        "token shade-1",
    ]
    shades = [tokens.nth(place).evaluate("token => getComputedStyle(token).backgroundColor") for place in range(3)]
    assert len(set(shades)) == 3
    assert "cost 0.31 > 0.3" in page.locator("#detail .verdict").inner_text()


def test_side_by_side_shows_two_students_on_one_problem(page):
    page.select_option("#student", label="constrained")
    page.select_option("#beside", label="grpo")
    page.locator("#list li").nth(5).click()
    columns = page.locator("#detail .rollout")
    assert columns.locator("h3").all_inner_texts() == ["constrained", "grpo"]
    left, right = (columns.nth(place).bounding_box() for place in (0, 1))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]


def test_the_keyboard_is_enough(page):
    page.focus("#list")
    for key in ("ArrowDown", "ArrowDown", "ArrowUp", "End", "Home", "PageDown"):
        page.keyboard.press(key)
    chosen = page.locator("#list [aria-selected=true]")
    assert chosen.get_attribute("id") == "rollout-10"
    assert page.locator("#list").get_attribute("aria-activedescendant") == "rollout-10"
    page.select_option("#beside", "")
    page.focus("#detail .completion")
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight"):
        page.keyboard.press(key)
    assert page.locator("#detail .current").inner_text() == "t1 "
    assert page.locator("#detail .readout").inner_text().startswith('token 2 of 3 "t1 ": 0.375 nats')


def test_a_link_opens_the_view_that_it_was_taken_from(page, browser, url):
    page.select_option("#student", label="grpo")
    page.select_option("#beside", label="constrained")
    page.fill("#search", "4 + 1")
    page.locator("#list li").nth(1).click()
    link = page.locator("#link").get_attribute("href")
    assert page.url == url + link
    other = browser.new_context(viewport=DESKTOP).new_page()
    other.goto(url + link)
    assert other.locator("#detail").inner_text() == page.locator("#detail").inner_text()
    assert other.locator("#list li").count() == 2
    assert other.input_value("#search") == "4 + 1"
    assert other.locator("#rollouts").evaluate("section => Math.abs(section.getBoundingClientRect().top) < 100")
    other.goto(url + "#rollouts?student=77&rollout=%3Cscript%3E&sort=no")  # nonsense opens the whole list
    other.reload()
    assert other.locator("#list li").count() == 24
    other.context.close()


def test_a_completion_of_markup_runs_nothing(page):
    page.select_option("#student", label="grpo")
    page.locator("#list li").first.click()
    assert page.locator("#detail .token").first.inner_text() == HOSTILE
    page.locator("#detail .token").first.hover()
    page.wait_for_timeout(300)
    assert page.evaluate("window.ran") is None
    assert page.locator("img, iframe, #detail script").count() == 0
    assert page.locator("script").count() == 2  # the data and the page's own


def test_the_policy_stops_what_would_run(browser, url):
    """The second wall: even markup that came into the page would not run."""
    page = browser.new_context().new_page()
    page.goto(url)
    page.evaluate(
        """text => {
        document.body.insertAdjacentHTML("beforeend", text);
        const script = document.createElement("script");
        script.textContent = "window.ran = 1";
        document.body.append(script);
    }""",
        HOSTILE,
    )
    page.wait_for_timeout(300)
    assert page.locator("img").count() == 1  # it is there, and could not run
    assert page.evaluate("window.ran") is None
    page.context.close()


def test_it_opens_with_two_students_beside_one_another(page):
    assert page.locator("#detail h3").all_inner_texts() == ["constrained", "grpo"]


def test_a_card_of_a_phone_names_each_value(browser, url):
    page = browser.new_page(viewport=PHONE)
    page.goto(url)
    cell = page.locator("#summary tbody td").first
    assert cell.evaluate("cell => getComputedStyle(cell, '::before').content") == '"correct answers"'
    head, value = page.locator("#summary tbody th").first.bounding_box(), cell.bounding_box()
    assert value["y"] >= head["y"] + head["height"]
    page.close()


def test_screenshots_are_taken_of_two_reports_and_nothing_is_at_fault(browser, tmp_path):
    pages = screenshots.default_pages(tmp_path)
    assert pages.keys() >= screenshots.REPORTS.keys()
    assert screenshots.take(browser, pages, tmp_path) == []
    names = {
        f"{report}-{device}-{scheme}.png"
        for report in screenshots.REPORTS
        for device in screenshots.VIEWPORTS
        for scheme in screenshots.SCHEMES
    }
    assert names <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("markup", "fault"),
    [
        ("<p style='width: 3000px'>wide</p>", "the page is 30"),
        ("<div style='overflow-x: auto'><table style='width: 3000px'><tr><td>wide</td></tr></table></div>", "div. is 3000 px wide"),
        ("<p style='width: 3em; overflow-wrap: anywhere'>satisfaction</p>", "the word satisfaction is broken"),
        ("<pre style='overflow: auto'><code>" + "code " * 1000 + "</code></pre><p style='width: 1em'>two words</p>", None),
    ],
)  # fmt: skip
def test_the_screenshots_command_finds_faults(browser, markup, fault):
    page = browser.new_page(viewport=PHONE)
    page.set_content(markup)
    found = page.evaluate(screenshots.FAULTS)
    assert found == [] if fault is None else [fault] == [text[: len(fault)] for text in found]
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_fits_and_can_be_read(browser, url, viewport, scheme):
    context = browser.new_context(viewport=viewport, color_scheme=scheme)
    page = context.new_page()
    page.goto(url)
    assert page.evaluate(screenshots.FAULTS) == []
    assert min(page.evaluate(CONTRAST)) >= 4.5  # WCAG AA
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = page.locator("#plot-costs-title").evaluate("title => getComputedStyle(title.parentNode).fill")
    assert (sum(map(int, paper[4:-1].split(","))) > 600) == (scheme == "light")
    assert (sum(map(int, ink[4:-1].split(","))) < 200) == (scheme == "light")
    if viewport is PHONE:
        columns = page.locator("#detail .rollout")
        assert columns.nth(1).bounding_box()["y"] > columns.nth(0).bounding_box()["y"]
    context.close()
