"""`trl-cmdp report`: real records of a comparison become a page; mistakes are one line."""

from pathlib import Path

from report_runs import write_state

from trl_cmdp.cli import main, report


COMPARISON = Path(__file__).parents[2] / "benchmarks" / "results" / "nested"


def test_a_comparison_becomes_a_page(tmp_path, capsys):
    assert main(["report", str(COMPARISON), "--output-dir", str(tmp_path), "--title", "Nested sums"]) == 0
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    text = (tmp_path / "report.html").read_text()
    assert "<h1>Nested sums</h1>" in text
    assert "Comparison: nested" in text
    assert (tmp_path / "comparison-1-pareto.png").read_bytes().startswith(b"\x89PNG")


def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nothing"), "--output-dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"trl-cmdp report: error: {tmp_path / 'nothing'} does not exist.\n"
    assert not (tmp_path / "out").exists()


def test_a_watched_page_is_written_anew_when_the_run_has_gone_on(tmp_path, monkeypatch, capsys):
    run, page = tmp_path / "run", tmp_path / "out" / "report.html"
    pages = []

    def sleep(seconds):
        """What happens while the command waits: the run begins, nothing, it goes on, Ctrl-C."""
        assert seconds == 3
        pages.append(page.read_text() if page.exists() else None)
        if len(pages) in (1, 3):
            write_state(run, steps=4 * len(pages))
        if len(pages) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(report.time, "sleep", sleep)
    assert main(["report", str(run), "--output-dir", str(page.parent), "--watch", "3"]) == 0
    assert pages[0] is None
    assert pages[1] == pages[2] != pages[3]
    for text, steps in ((pages[1], 4), (pages[3], 12)):
        assert '<meta http-equiv="refresh" content="3">' in text
        assert f'data-label="steps"><span class="value">{steps}</span>' in text
    assert "refresh" not in page.read_text()  # the last page stays as it is
    output = capsys.readouterr().out
    assert output.count(f"Waiting: {run} does not exist.") == 1
    assert output.count("report.html (") == 3
