"""The trainers: a method is a signal (docs/math.md), one config and one trainer file each."""

from .constrained_config import ConstrainedDistillConfig
from .constrained_trainer import ConstrainedDistillTrainer
from .lagrangian_config import LagrangianDistillConfig
from .lagrangian_trainer import LagrangianDistillTrainer


__all__ = [
    "ConstrainedDistillConfig",
    "ConstrainedDistillTrainer",
    "LagrangianDistillConfig",
    "LagrangianDistillTrainer",
]
