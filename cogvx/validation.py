"""Argument validation, with errors of the form "where: name must be …; got …". Imports no torch."""

import difflib
import math
import operator
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

NUMBER_DIGITS = 24


def invalid(
    where: str, name: str, wanted: str, got: object, kind: type[Exception] = ValueError
) -> Exception:
    """Error for an invalid argument."""
    return kind(f"{where}: {name} must be {wanted}; got {got}")


def check_choice(where: str, name: str, value: object, wanted: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of `wanted`."""
    if value not in wanted:
        names = ", ".join(f'"{w}"' for w in wanted)
        raise invalid(where, name, f"one of {names}", repr(value))


def check_integer(where: str, name: str, value: Any) -> int:
    """The value as an int. Raises TypeError for other types."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise invalid(where, name, "an integer", f"{value!r:.80}", TypeError)


def check_number(where: str, name: str, value: Any) -> float:
    """The value as a float. Raises TypeError for other types, ValueError if it is not finite."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise invalid(where, name, "a number", f"{value!r:.80}", TypeError)
    if not math.isfinite(value):
        raise invalid(where, name, "a finite number", value)
    return float(value)


def did_you_mean(word: str, known: Iterable[str], most: int = 1) -> str:
    """Suggest the nearest known names, for the end of a message; "" if none is near."""
    near = difflib.get_close_matches(word[:60], list(known), most)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def unknown_key(where: str, key: object, known: Iterable[str]) -> ValueError:
    """Error for an unknown key of a table or config."""
    names, name = sorted(known), str(key)[:60]
    return ValueError(
        f"{where}: unknown key {name!r}{did_you_mean(name, names) or '.'} The keys are "
        f"{', '.join(names)}"
    )


def describe(value: Any) -> str:
    """Describe a value: a tensor as "float32 (1, 2)", others as "5 (int)"."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{dtype_name(value.dtype)} {tuple(value.shape)}"
    return f"{str(value)[:60]} ({type(value).__name__})"


def dtype_name(dtype: object) -> str:
    """Name of a torch dtype: float32."""
    return str(dtype).removeprefix("torch.")


def short_repr(value: object, limit: int = 80) -> str:
    """Truncated `repr` of an untrusted value."""
    if isinstance(value, int) and abs(value) >= 10**NUMBER_DIGITS:
        return "a huge integer"
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


def format_list(lines: list[str], limit: int = 10) -> str:
    """Format the first lines, indented, and the number of the others."""
    more = [f"… and {len(lines) - limit} more"] if len(lines) > limit else []
    return "".join(f"\n    {line}" for line in lines[:limit] + more)
