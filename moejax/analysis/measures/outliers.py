"""Super experts: the few whose outputs have extreme values.

Letters: L MoE layers, E experts.
Source: arXiv:2507.23279: removing three of 6,144 such experts ruins Qwen3-30B-A3B.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

PERCENTILE, OF_MAXIMUM = 99.5, 0.1
"""A super expert's largest output is above this percentile of those of all experts, and
above this fraction of the largest."""


def super_experts(
  largest: Float[np.ndarray, "L E"], layers: tuple[int, ...]
) -> list[dict[str, Any]]:
  """Returns the experts whose largest output stands out in the whole model.

  With fewer than 200 experts the percentile always selects the largest one. Its `ratio`
  to the median of all experts shows whether it is an outlier at all.

  Args:
    largest: max |output| of each expert over the tokens it computes.
    layers: index in the model of each row.
  """
  threshold = max(np.percentile(largest, PERCENTILE), OF_MAXIMUM * largest.max())
  median = float(np.median(largest[largest > 0])) if (largest > 0).any() else 1.0
  found = np.argwhere((largest >= threshold) & (largest > 0))
  rows = [
    {
      "layer": layers[i],
      "expert": int(e),
      "largest": float(largest[i, e]),
      "ratio": float(largest[i, e]) / median,
    }
    for i, e in found
  ]
  return sorted(rows, key=lambda row: -row["largest"])
