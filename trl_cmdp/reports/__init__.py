"""Plots, drawn from records only."""

from .training_curves import plot_training_curves


__all__ = ["plot_training_curves"]
