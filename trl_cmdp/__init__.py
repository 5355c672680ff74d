"""Reward-aware distillation of language models under a teacher budget that holds (arXiv 2509.22921)."""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .trainers import (
        ConstrainedDistillConfig,
        ConstrainedDistillTrainer,
        GKDDistillConfig,
        GKDDistillTrainer,
        LagrangianDistillConfig,
        LagrangianDistillTrainer,
        MiniLLMDistillConfig,
        MiniLLMDistillTrainer,
    )

__version__ = "0.1.0"

__all__ = [
    "ConstrainedDistillConfig",
    "ConstrainedDistillTrainer",
    "GKDDistillConfig",
    "GKDDistillTrainer",
    "LagrangianDistillConfig",
    "LagrangianDistillTrainer",
    "MiniLLMDistillConfig",
    "MiniLLMDistillTrainer",
]


# Importing TRL takes seconds. `trl_cmdp.core` and the command line's help should not wait for it.
def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module(".trainers", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
