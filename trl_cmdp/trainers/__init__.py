"""The trainers: a method is a signal (docs/math.md), one config and one trainer file each."""

from .constrained_config import ConstrainedDistillConfig
from .constrained_trainer import ConstrainedDistillTrainer
from .gkd_config import GKDDistillConfig
from .gkd_trainer import GKDDistillTrainer
from .lagrangian_config import LagrangianDistillConfig
from .lagrangian_trainer import LagrangianDistillTrainer
from .minillm_config import MiniLLMDistillConfig
from .minillm_trainer import MiniLLMDistillTrainer


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
