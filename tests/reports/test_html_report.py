"""The page: nothing but itself, every figure from the summary, and no text of a model as markup."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from report_runs import HOSTILE, LIMIT, rollout, rollouts, settings, teacher_rollouts, write_evaluation, write_state

from trl_cmdp.evaluation.summary import summarize
from trl_cmdp.reports import read_runs, write_report
from trl_cmdp.reports._curves import rate_band


class Page(HTMLParser):
    """Elements, ids, and the text of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.raw, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw.append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] in ("script", "style") and self.cdata_elem:
            self.raw[-1] += data
        else:
            self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of two students, one of which writes markup, of their teacher, and of two training runs."""
    folder = tmp_path_factory.mktemp("report")
    hostile = rollout(0, 0, [2.0, 0.1], tokens=[HOSTILE, " \ud800\u2028"], prompt="0 + 1 =", difficulty="1 steps")
    runs = [
        write_evaluation(folder / "a", rollouts(0.3)),
        write_evaluation(folder / "b", [hostile, *rollouts(3)[1:]], f"grpo {HOSTILE}$x$"),
        write_evaluation(folder / "c", teacher_rollouts(), "teacher", student="teacher"),
        write_state(folder / "first" / "checkpoint-12"),
        write_state(folder / "second" / "checkpoint-12"),
    ]
    written = write_report(read_runs(runs), folder / "out", title=HOSTILE)
    text = written[0].read_text(encoding="utf-8")
    return written, text, Page(text)


def test_the_page_asks_for_nothing(report):
    _, text, page = report
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert "style" not in attributes
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in re.sub(r"url\(#", "", text)
    assert "@import" not in text


def test_the_policy_allows_its_own_style_and_script_alone(report):
    _, _, page = report
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    style, data, script = page.raw
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (style, script)]
    assert policy.startswith("default-src 'none'; ")
    assert f"style-src 'sha256-{hashes[0]}'" in policy
    assert f"script-src 'sha256-{hashes[1]}'" in policy
    assert "unsafe" not in policy
    assert re.findall(r"img-src ([^;]*)", policy) == ["data:"]  # those of the prompts, which the page holds itself
    assert json.loads(data)["limit"] == LIMIT


def test_what_a_model_wrote_is_never_markup(report):
    _, text, page = report
    assert "<script>window" not in text
    assert "<img" not in text
    assert len(page.raw) == 3
    data = json.loads(page.raw[1])
    assert any(one["tokens"][0] == HOSTILE for one in data["rollouts"])
    assert HOSTILE in page.text  # as text: title and name


def test_ids_are_unique_and_labels_lead_somewhere(report):
    _, _, page = report
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for name in ("aria-labelledby", "href"):
            if name in attributes:
                assert attributes[name].lstrip("#") in ids


def test_tables_have_headers_and_the_exact_figures(report):
    _, text, page = report
    assert all(a.get("scope") in ("col", "row") for tag, a in page.elements if tag == "th")
    summary = summarize(settings(), rollouts(0.3)).sampled
    for figure, factor, form, unit in (
        (summary.right, 100, ".1f", "%"),
        (summary.costs.satisfaction, 100, ".1f", "%"),
        (summary.costs.mean, 1, ".3f", ""),
    ):
        value, low, high = (f"{factor * bound:{form}}" for bound in (figure.value, figure.low, figure.high))
        assert f'<span class="value">{value}{unit}</span> <span class="interval">{low} to {high}</span>' in text
    assert f"{100 * summary.costs.violation_bound:.1f}%" in text


def test_the_teacher_is_a_row_and_no_student(report):
    _, text, _ = report
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', text, re.DOTALL)
    (cells,) = {cells for name, cells in rows if name.endswith("teacher") and 'within the limit"' in cells}
    assert "100.0%" in cells
    assert "2 students and their teacher on 6 problems" in text
    assert "teacher: divergence by token" not in text


def test_verdicts_come_first(report):
    _, text, _ = report
    lines = re.findall(r'<li class="(\w+)"><strong>(.*?)</strong> (.*?)</li>', text[: text.index("<main")])
    assert [kind for kind, _, _ in lines] == ["inside", "outside"]
    assert lines[0][1] == "constrained: inside the limit."
    assert lines[0][2].startswith("100.0% of the rollouts cost at most 0.3 nats per token, at most 39.3% exceed it")
    assert lines[0][2].endswith("Correct 66.7%, teacher 100.0%.".replace("Correct", "correct"))


def test_a_cell_says_its_column_on_a_phone(report):
    """There a table has no head: each cell has its column's name."""
    _, text, _ = report
    for table in re.findall(r"<table.*?</table>", text, re.DOTALL):
        columns = [re.sub("<.*?>", "", column) for column in re.findall(r'<th scope="col">(.*?)</th>', table)]
        for row in re.findall(r"<tr><th scope=\"row\">.*?</tr>", table, re.DOTALL):
            labels = re.findall(r'data-label="(.*?)"', row)
            assert labels in (columns[1:], ["all"])


def test_a_hash_is_short(tmp_path):
    digest = "0123456789abcdef" * 4
    run = write_evaluation(tmp_path / "a", rollouts(0.3), student_fingerprint=digest, git_commit=digest[:40])
    text = write_report(read_runs([run]), tmp_path / "out")[0].read_text()
    assert digest[:12] in text
    assert digest[:13] not in text


def test_a_watched_page_loads_itself_anew(tmp_path):
    runs = read_runs([write_evaluation(tmp_path / "a", rollouts(0.3))])
    pages = [Page(write_report(runs, tmp_path / "out", refresh=seconds)[0].read_text()) for seconds in (7, None)]
    refreshes = [[a["content"] for tag, a in page.elements if a.get("http-equiv") == "refresh"] for page in pages]
    assert refreshes == [["7"], []]


def test_every_plot_is_a_png_and_in_the_page(report):
    written, text, page = report
    names = {path.stem for path in written[1:]}
    assert {"pareto", "costs", "divergence-1", "divergence-2", "difficulty-right", "difficulty-satisfaction"} <= names
    assert {"training-reward", "training-cost", "training-satisfaction", "training-multiplier"} <= names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])
    titles = {a["id"] for tag, a in page.elements if tag == "title" and a}
    assert titles == {f"plot-{name}-title" for name in names}
    assert not re.search(r'(fill|stroke)="#(000000|ffffff)"', text)  # light and dark alike


def test_the_same_runs_give_the_same_page(tmp_path):
    runs = read_runs([write_evaluation(tmp_path / "a", rollouts(0.3))])
    pages = [write_report(runs, tmp_path / name)[0].read_bytes() for name in ("one", "two")]
    assert pages[0] == pages[1]


def test_a_capped_page_says_so(tmp_path):
    runs = read_runs([write_evaluation(tmp_path / "a", rollouts(0.3))])
    text = write_report(runs, tmp_path / "out", max_rollouts=6)[0].read_text()
    assert "The page holds 6 of 12 rollouts: all those of 3 of 6 problems" in text
    assert len(json.loads(Page(text).raw[1])["rollouts"]) == 6


def test_a_page_of_some_rollouts_of_one_problem_says_so(tmp_path):
    records = [rollout(0, sample, [0.1]) for sample in range(20)]
    runs = read_runs([write_evaluation(tmp_path / "a", records, num_problems=1, num_samples=20)])
    text = write_report(runs, tmp_path / "out", max_rollouts=5)[0].read_text()
    assert "The page holds 5 of 20 rollouts: some of those of one problem of 1" in text
    assert len(json.loads(Page(text).raw[1])["rollouts"]) == 5


def test_a_plot_of_many_rollouts_has_few_points(tmp_path):
    records = [rollout(problem, 0, [0.001 * problem]) for problem in range(4000)]
    runs = read_runs([write_evaluation(tmp_path / "a", records, num_problems=4000, num_samples=1)])
    written = write_report(runs, tmp_path / "out", max_rollouts=1)
    assert written[0].stat().st_size < 500_000


def test_what_goes_wrong_leaves_the_earlier_report(tmp_path, monkeypatch):
    runs = read_runs([write_evaluation(tmp_path / "a", rollouts(0.3))])
    out = tmp_path / "out"
    write_report(runs, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    other = read_runs([write_evaluation(tmp_path / "b", rollouts(1))])
    monkeypatch.setattr("trl_cmdp.reports.html_report.browser_data", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(other, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_what_is_not_recorded_yet_is_said(tmp_path):
    text = write_report(read_runs([write_evaluation(tmp_path / "a", rollouts(1)[:7])]), tmp_path / "out")[
        0
    ].read_text()
    assert "5 of the rollouts asked for are not recorded yet" in text


def test_an_evaluation_without_a_teacher_has_no_costs(tmp_path):
    records = [rollout(problem, 0, None, difficulty=None) for problem in range(6)]
    runs = read_runs([write_evaluation(tmp_path / "a", records, teacher=None, num_samples=1)])
    written = write_report(runs, tmp_path / "out")
    assert len(written) == 1
    assert "within the limit" not in Page(written[0].read_text()).text


class TestRateBand:
    def test_counts_add_up_whatever_the_rounding(self):
        # 0.8 of 2 rollouts is no whole number: rounded alone, every one of them would be 2.
        _, low, high = rate_band([0.8] * 10, batch_size=2, window=10)
        assert low[-1] < 0.8 < high[-1]
        assert high[-1] < 0.99

    def test_a_rate_of_one_keeps_its_doubt(self):
        _, low, high = rate_band([1.0] * 10, batch_size=4, window=10)
        assert low[-1] < 0.95
        assert high[-1] == 1

    def test_a_long_history_is_thinned_to_its_end(self):
        places, low, high = rate_band([0.5] * 1001, batch_size=4, window=10)
        assert places[-1] == 1000
        assert len(places) == len(low) == len(high) <= 200
