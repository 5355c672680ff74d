"""Lagrange multipliers λ of the soft constraint E[C] ≤ d: fixed, dual ascent, PID control."""

from dataclasses import dataclass


@dataclass
class FixedMultiplier:
    """
    A constant λ.

    Args:
        value (`float`):
            λ.
    """

    value: float

    def update(self, violation: float) -> None:
        """Nothing moves a fixed multiplier."""


@dataclass
class DualMultiplier:
    """
    Projected gradient ascent on the dual: λ ← clip(λ + lr·(cost − limit), 0, maximum). Plain SGD: Adam on one scalar
    would move by its learning rate whatever the violation.

    Args:
        value (`float`):
            λ, initially and from then on.
        lr (`float`):
            Step size, per nat of violation.
        maximum (`float`):
            Upper bound of λ.
    """

    value: float
    lr: float
    maximum: float

    def update(self, violation: float) -> None:
        """Move λ by one step, given cost − limit of the window just seen."""
        self.value = min(max(self.value + self.lr * violation, 0.0), self.maximum)


@dataclass
class PIDMultiplier:
    """
    PID control of λ (2007.03964, algorithm 2), with the violation as error: λ = clip(kp·e + ki·Σe + kd·max(0, Δe)).

    Proportional and derivative parts see an exponential moving average of the violation. The integral is kept within
    what λ can use (anti-windup), so that a long violation is not paid for twice.

    Args:
        value (`float`):
            λ, initially and from then on. The integral starts at what gives this λ.
        kp (`float`):
            Proportional gain.
        ki (`float`):
            Integral gain.
        kd (`float`):
            Derivative gain.
        ema (`float`):
            Weight of the past in the moving average, in [0, 1).
        maximum (`float`):
            Upper bound of λ.
        integral (`float`, *optional*):
            ki·Σe so far.
        smoothed (`float`, *optional*):
            Moving average of the violation so far; `None` before the first update.
    """

    value: float
    kp: float
    ki: float
    kd: float
    ema: float
    maximum: float
    integral: float | None = None
    smoothed: float | None = None

    def update(self, violation: float) -> None:
        """Set λ, given cost − limit of the window just seen."""
        previous = self.smoothed
        smoothed = violation if previous is None else self.ema * previous + (1 - self.ema) * violation
        integral = self.value if self.integral is None else self.integral
        self.integral = min(max(integral + self.ki * violation, 0.0), self.maximum)
        rise = 0.0 if previous is None else max(0.0, smoothed - previous)
        self.value = min(max(self.kp * smoothed + self.integral + self.kd * rise, 0.0), self.maximum)
        self.smoothed = smoothed
