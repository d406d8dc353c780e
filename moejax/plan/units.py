"""Formats numbers, such as 1.23 GB and 3.40 ms; a number other than 0 is never 0.00."""

_SCALES = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0, "m": 1e-3, "µ": 1e-6}


def quantity(value: float, unit: str = "", *, largest: str = "G") -> str:
  """Returns a number with the largest prefix that makes it at least 1.

  Args:
    value: not negative.
    unit: such as B or s.
    largest: the largest prefix to use, also for larger numbers, so that figures of large
      models are easy to compare.
  """
  if not value:
    return f"0 {unit}".strip()
  prefixes = list(_SCALES)
  prefixes = prefixes[prefixes.index(largest) :]
  prefix = next((p for p in prefixes if value >= _SCALES[p]), prefixes[-1])
  return f"{value / _SCALES[prefix]:,.2f} {prefix}{unit}".strip()


def fixed(value: float, digits: int) -> str:
  """Returns a number with `digits` decimals, or two digits if it would be all zeros."""
  text = f"{value:,.{digits}f}"
  return text if any(c in "123456789" for c in text) or not value else f"{value:.2g}"
