"""Are two mathematical expressions equal? Parsed by latex2sympy, which math-verify brings, and compared by sympy.

It runs in a process of its own, see `_verify.py`: nothing here is bounded in time. math-verify's own comparison rounds to
six decimals, so it takes small values for equal.
"""

from collections.abc import Callable, Iterable
from fractions import Fraction
from itertools import chain
from typing import Any

import sympy
from sympy.core.relational import Equality, Relational, Unequality

from ._spelling import Number, number, without_unit


__all__ = ["equal"]

_SYMMETRIC = (Equality, Unequality)
_DIGITS = 50  # to which values are computed before a proof is tried


def equal(stated: str, expected: str) -> bool:
    """
    Compares two expressions.

    Args:
        stated (`str`):
            Expression in [`_spelling.one_spelling`].
        expected (`str`):
            Another.

    Returns:
        `bool`: Whether they are equal. A decimal fraction of at least six significant digits is also equal to what
        it is the rounded value of.

    Raises:
        Exception: If one cannot be parsed or compared.
    """
    numbers = number(stated), number(expected)
    values = _value(stated, numbers[0]), _value(expected, numbers[1])
    return _same(*values) or any(
        plain is not None and _rounds(plain, value) for plain, value in zip(numbers, reversed(values), strict=True)
    )


def _value(text: str, plain: Number | None) -> Any:
    """What an expression is to sympy, with decimal fractions as exact ones. Relations are tuples of them."""
    if plain is not None and not plain.percent:
        return sympy.Rational(plain.value.numerator, plain.value.denominator)
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy

    latex = without_unit(text).replace("°", r"^\circ").replace("'", "_{prime}")  # which are lost otherwise
    spelling = NormalizationConfig(malformed_operators=True, boxed="none")
    names = ConversionConfig(lowercase_symbols=False)
    return _exact(
        latex2sympy(
            latex, None, is_real=True, convert_degrees=True, normalization_config=spelling, conversion_config=names
        )
    )


def _exact(value: Any) -> Any:
    if isinstance(value, sympy.MatrixExpr):
        value = value.doit()
    if isinstance(value, sympy.MatrixBase):
        return value.applyfunc(_exact)
    if isinstance(value, sympy.And):
        return tuple(chain.from_iterable(map(_exact, value.args)))
    if isinstance(value, sympy.FiniteSet):
        return sympy.FiniteSet(*map(_exact, value.args))
    if not isinstance(value, sympy.Basic):
        raise TypeError(f"{type(value).__name__} is no expression")
    exact = {number: sympy.Rational(str(number)) for number in value.atoms(sympy.Float)}
    imaginary = {symbol: sympy.I for symbol in value.free_symbols if symbol.name == "i"}
    names = {symbol: symbol.name.lower() for symbol in value.free_symbols - imaginary.keys()}
    lower = {symbol: sympy.Symbol(name, **symbol.assumptions0) for symbol, name in names.items()}
    if len(set(names.values())) < len(names):  # V / v
        lower = {}
    value = value.xreplace(exact | imaginary | lower)
    return (value,) if isinstance(value, Relational) else value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape == b.shape and all(map(_same, a.flat(), b.flat()))
    if isinstance(a, sympy.Set) or isinstance(b, sympy.Set):
        return _sets_agree(_solutions(a), _solutions(b))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return _match(_relations_agree, a, b)
    return not isinstance(a, tuple) and not isinstance(b, tuple) and _expressions_agree(a, b)


def _match(agree: Callable[[Any, Any], bool], a: Iterable[Any], b: Iterable[Any]) -> bool:
    """Whether each of `a` agrees with one of `b` of its own, and none is left."""
    left = list(b)
    for one in a:
        other = next((other for other in left if agree(one, other)), None)
        if other is None:
            return False
        left.remove(other)
    return not left


def _relations_agree(a: Any, b: Any) -> bool:
    """Whether one relation is a multiple of the other: `2x < 6` and `3 > x`."""
    differences = []
    for relation in (a, b):
        sides = (relation.lhs, relation.rhs) if isinstance(relation, _SYMMETRIC) else (relation.gts, relation.lts)
        differences.append(sides[0] - sides[1])
    if _kind(a) is not _kind(b):
        return False
    ratio = sympy.simplify(differences[0] / differences[1])
    return bool(ratio.is_number and (ratio.is_positive or (isinstance(a, _SYMMETRIC) and ratio.is_nonzero)))


def _kind(relation: Any) -> Any:
    """Type of a relation, whichever side is the greater one."""
    return {sympy.Lt: sympy.Gt, sympy.Le: sympy.Ge}.get(relation.func, relation.func)


def _solutions(value: Any) -> Any:
    """The set that a chain of relations describes; a value is the set of itself."""
    if isinstance(value, tuple):
        return sympy.And(*value).as_set()
    return value if isinstance(value, sympy.Set) else sympy.FiniteSet(value)


def _sets_agree(a: Any, b: Any) -> bool:
    if isinstance(a, sympy.FiniteSet) and isinstance(b, sympy.FiniteSet):
        return _match(_same, a.args, b.args)
    return bool(a == b or a.symmetric_difference(b).is_empty)


def _expressions_agree(a: Any, b: Any) -> bool:
    if a == b:
        return not a.has(sympy.nan, sympy.zoo)
    # Expressions that differ at one point are not equal: that is found in no time, a proof may take seconds.
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    point = {symbol: sympy.Rational(13 + 2 * index, 7) for index, symbol in enumerate(symbols)}
    if _agree_at(point, a, b, _DIGITS) is False:
        return False
    difference = sympy.simplify(a.doit() - b.doit())
    if symbols or difference.is_zero is not None:
        return bool(difference.is_zero)
    proven = difference.equals(0)
    return bool(_agree_at({}, a, b, 20 * _DIGITS) if proven is None else proven)


def _agree_at(point: dict[Any, Any], a: Any, b: Any, digits: int) -> bool | None:
    """Whether values agree to so many significant digits, `None` if that cannot be told: one is zero or not finite."""
    a, b = (value.subs(point).evalf(digits + 10, maxn=20 * digits) for value in (a, b))
    if not (a.is_number and b.is_number and a.is_finite and b.is_finite) or a == 0 or b == 0:
        return None
    return bool(abs(a - b) <= abs(b) * sympy.Float(10) ** -digits)


def _rounds(plain: Number, value: Any) -> bool:
    """Whether a plain number is the value of an expression, rounded."""
    if not isinstance(value, sympy.Expr) or value.free_symbols or plain.precision is None:
        return False
    value = value.doit()
    exact = isinstance(value, sympy.Rational)
    value = value if exact else value.evalf(_DIGITS)
    return any(reading.rounds(Fraction(str(value)), exact) for reading in plain.readings())
