"""Plots, tables and pages, drawn from records only."""

from .comparison_plots import plot_comparison_curves, plot_pareto
from .html_report import write_report
from .runs import read_runs
from .tables import comparison_table, difference_table, evaluation_table, strata_table
from .training_curves import plot_training_curves


__all__ = [
    "comparison_table",
    "difference_table",
    "evaluation_table",
    "plot_comparison_curves",
    "plot_pareto",
    "plot_training_curves",
    "read_runs",
    "strata_table",
    "write_report",
]
