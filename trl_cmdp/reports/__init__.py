"""Plots and tables, drawn from records only."""

from .comparison_plots import plot_comparison_curves, plot_pareto
from .comparison_table import comparison_table
from .training_curves import plot_training_curves


__all__ = ["comparison_table", "plot_comparison_curves", "plot_pareto", "plot_training_curves"]
