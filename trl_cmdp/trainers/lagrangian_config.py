"""Configuration of the Lagrangian baselines."""

from dataclasses import dataclass
from typing import Literal

from .._defaults import check_not_zero
from .engine.config import DistillConfig, help_from_docstring


@help_from_docstring
@dataclass(kw_only=True)
class LagrangianDistillConfig(DistillConfig):
    """
    Configuration of [`LagrangianDistillTrainer`]. Every field of [`~trl.GRPOConfig`] keeps its name, position and
    default; the fields below are keyword-only.

    Parameters:
        multiplier (`str`, *optional*, defaults to `"fixed"`):
            `"fixed"`: λ stays at `multiplier_init`. `"dual"`: projected gradient ascent. `"pid"`: PID control.
        multiplier_init (`float`, *optional*, defaults to `0.01`):
            λ at the start.
        multiplier_lr (`float`, *optional*, defaults to `0.01`):
            Step size of `"dual"`.
        multiplier_max (`float`, *optional*, defaults to `10.0`):
            Upper bound of λ.
        pid_kp (`float`, *optional*, defaults to `0.05`):
            Proportional gain of `"pid"`.
        pid_ki (`float`, *optional*, defaults to `0.01`):
            Integral gain of `"pid"`.
        pid_kd (`float`, *optional*, defaults to `0.01`):
            Derivative gain of `"pid"`.
        pid_cost_ema (`float`, *optional*, defaults to `0.9`):
            Weight of the past in the moving average that `"pid"` sees.

    And those shared by every trainer (see [`DistillConfig`]); with a fixed multiplier satisfaction is only measured
    against `cost_limit`.
    """

    multiplier: Literal["fixed", "dual", "pid"] = "fixed"
    multiplier_init: float = 0.01
    multiplier_lr: float = 0.01
    multiplier_max: float = 10.0
    pid_kp: float = 0.05
    pid_ki: float = 0.01
    pid_kd: float = 0.01
    pid_cost_ema: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        self._check_positive("multiplier_max")
        self._check_not_negative("multiplier_init", "multiplier_lr", "pid_kp", "pid_ki", "pid_kd")
        self._check_below_one("pid_cost_ema")
        if self.multiplier_init > self.multiplier_max:
            raise ValueError(
                f"`multiplier_init` ({self.multiplier_init}) is above `multiplier_max` ({self.multiplier_max})."
            )

    def _check_cost_limit(self) -> None:
        check_not_zero(self.cost_limit)
        super()._check_cost_limit()
