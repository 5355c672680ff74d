"""Multipliers find the λ* of a problem whose solution is known, stay in their bounds, and go on from a saved state."""

from dataclasses import asdict

import pytest

from trl_cmdp.core import DualMultiplier, FixedMultiplier, PIDMultiplier


LIMIT = 0.5


def quadratic_toy(multiplier, steps, x=2.0, lr=0.2):
    """
    Minimise (x − 2)² under cost(x) = x² ≤ 0.5 by gradient descent on the Lagrangian. At the optimum x* = √0.5, and
    stationarity, 2(x* − 2) + 2λ*x* = 0, gives λ* = 2/√0.5 − 1.
    """
    for _ in range(steps):
        x -= lr / (1 + multiplier.value) * (2 * (x - 2) + 2 * multiplier.value * x)
        multiplier.update(x**2 - LIMIT)
    return x


OPTIMUM, MULTIPLIER = LIMIT**0.5, 2 / LIMIT**0.5 - 1


@pytest.mark.parametrize(
    "multiplier",
    [
        DualMultiplier(value=0.0, lr=0.1, maximum=10.0),
        PIDMultiplier(value=0.0, kp=0.5, ki=0.1, kd=0.1, ema=0.3, maximum=10.0),
    ],
)
def test_the_known_solution_is_reached(multiplier):
    x = quadratic_toy(multiplier, 2000)
    assert x == pytest.approx(OPTIMUM, abs=1e-6)
    assert multiplier.value == pytest.approx(MULTIPLIER, abs=1e-5)


def test_a_fixed_multiplier_stays():
    multiplier = FixedMultiplier(0.3)
    multiplier.update(1e6)
    assert multiplier.value == 0.3


@pytest.mark.parametrize(
    "multiplier",
    [
        DualMultiplier(value=1.0, lr=0.5, maximum=2.0),
        PIDMultiplier(value=1.0, kp=1.0, ki=0.5, kd=1.0, ema=0.0, maximum=2.0),
    ],
)
def test_bounds_hold_and_a_long_violation_does_not_wind_up(multiplier):
    for _ in range(100):
        multiplier.update(1.0)
        assert 0 <= multiplier.value <= 2.0
    assert multiplier.value == 2.0
    for _ in range(10):  # without anti-windup, the integral would hold λ up for a hundred steps
        multiplier.update(-1.0)
    assert multiplier.value == 0.0


def test_only_a_rise_of_the_violation_moves_the_derivative_part():
    multiplier = PIDMultiplier(value=0.0, kp=0.0, ki=0.0, kd=2.0, ema=0.0, maximum=10.0)
    values = []
    for violation in (0.5, 0.8, 0.3):
        multiplier.update(violation)
        values.append(multiplier.value)
    assert values == pytest.approx([0.0, 0.6, 0.0])


def test_a_saved_state_goes_on_as_if_never_interrupted():
    whole = PIDMultiplier(value=0.2, kp=0.5, ki=0.1, kd=0.1, ema=0.9, maximum=10.0)
    violations = [0.3, -0.1, 0.7, 0.2, -0.4]
    for violation in violations[:2]:
        whole.update(violation)
    resumed = PIDMultiplier(**asdict(whole))
    for violation in violations[2:]:
        whole.update(violation)
        resumed.update(violation)
    assert resumed == whole
