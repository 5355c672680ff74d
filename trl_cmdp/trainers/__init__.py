"""The trainers: a method is a signal (docs/math.md), one config and one trainer file each."""

from .engine.trl_hooks import moved_hooks


try:
    from .constrained_config import ConstrainedDistillConfig
    from .constrained_trainer import ConstrainedDistillTrainer
    from .gkd_config import GKDDistillConfig
    from .gkd_trainer import GKDDistillTrainer
    from .lagrangian_config import LagrangianDistillConfig
    from .lagrangian_trainer import LagrangianDistillTrainer
    from .minillm_config import MiniLLMDistillConfig
    from .minillm_trainer import MiniLLMDistillTrainer
except ImportError as error:
    if (error.name or "").startswith("trl."):
        raise moved_hooks(str(error)) from error
    raise

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
