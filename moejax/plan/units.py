"""Numbers in words: 1.23 GB, 3.40 ms, and never 0.00 for what is not nothing."""

_SCALES = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0, "m": 1e-3, "µ": 1e-6}


def quantity(value: float, unit: str = "", *, largest: str = "G") -> str:
  """Returns a number with the largest prefix of which it has at least one.

  Args:
    value: not negative.
    unit: such as B or s.
    largest: the largest prefix there is; a larger number keeps it, so that figures of
      large models compare.
  """
  if not value:
    return f"0 {unit}".strip()
  prefixes = list(_SCALES)
  prefixes = prefixes[prefixes.index(largest) :]
  prefix = next((p for p in prefixes if value >= _SCALES[p]), prefixes[-1])
  return f"{value / _SCALES[prefix]:,.2f} {prefix}{unit}".strip()


def fixed(value: float, digits: int) -> str:
  """Returns a number with so many decimals, or two digits if it would be all zeros."""
  text = f"{value:,.{digits}f}"
  return text if any(c in "123456789" for c in text) or not value else f"{value:.2g}"
