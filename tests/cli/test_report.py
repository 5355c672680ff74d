"""`trl-cmdp report`: real records of a comparison become a page; mistakes are one line."""

from pathlib import Path

from trl_cmdp.cli import main


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
