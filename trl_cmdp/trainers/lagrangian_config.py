"""Configuration of the Lagrangian baselines."""

from dataclasses import dataclass, field

from ._config import DistillConfig


@dataclass
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
        multiplier_signal (`str`, *optional*, defaults to `"cost"`):
            What moves λ: `"cost"`, the mean cost of a rollout minus `cost_limit`; or `"violation_rate"`, the share of
            rollouts above it minus `tolerated_violation_rate`, the share that leaves λ where it is.
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

    multiplier: str = field(
        default="fixed",
        kw_only=True,
        metadata={"help": "How the multiplier moves.", "choices": ["fixed", "dual", "pid"]},
    )
    multiplier_init: float = field(default=0.01, kw_only=True, metadata={"help": "Multiplier at the start."})
    multiplier_lr: float = field(default=0.01, kw_only=True, metadata={"help": "Step size of 'dual'."})
    multiplier_max: float = field(default=10.0, kw_only=True, metadata={"help": "Upper bound of the multiplier."})
    multiplier_signal: str = field(
        default="cost",
        kw_only=True,
        metadata={
            "help": "What moves the multiplier: mean cost minus limit, or violation rate minus a tolerated rate.",
            "choices": ["cost", "violation_rate"],
        },
    )
    pid_kp: float = field(default=0.05, kw_only=True, metadata={"help": "Proportional gain of 'pid'."})
    pid_ki: float = field(default=0.01, kw_only=True, metadata={"help": "Integral gain of 'pid'."})
    pid_kd: float = field(default=0.01, kw_only=True, metadata={"help": "Derivative gain of 'pid'."})
    pid_cost_ema: float = field(
        default=0.9, kw_only=True, metadata={"help": "Weight of the past in the moving average that 'pid' sees."}
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_choices(
            multiplier=("fixed", "dual", "pid"),
            multiplier_signal=("cost", "violation_rate"),
        )
        self._check_positive("multiplier_max")
        for name in ("multiplier_init", "multiplier_lr", "pid_kp", "pid_ki", "pid_kd"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.multiplier_init > self.multiplier_max:
            raise ValueError(
                f"`multiplier_init` ({self.multiplier_init}) is above `multiplier_max` ({self.multiplier_max})."
            )
        if not 0 <= self.pid_cost_ema < 1:
            raise ValueError(f"`pid_cost_ema` must lie in [0, 1), got {self.pid_cost_ema}.")
