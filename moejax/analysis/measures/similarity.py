"""Similarity of experts: of their outputs, and of their weights.

Letters: E experts, n tokens, D width.
"""

import numpy as np
from jaxtyping import Float


def cka(hsic: Float[np.ndarray, "E E"]) -> Float[np.ndarray, "E E"]:
  """Returns the linear CKA of two experts' outputs for the same tokens: 1 is the same up
  to rotation and scale, 0 is unrelated; estimates of unrelated outputs scatter around 0.

  CKA_ij = HSIC_ij / sqrt(HSIC_ii HSIC_jj) (Kornblith et al. 2019, arXiv:1905.00414), with
  the unbiased HSIC summed over batches (Nguyen et al. 2021, arXiv:2010.15327, section
  3.1), so that it does not rise with few tokens.

  Args:
    hsic: from `probe`.
  """
  own = np.sqrt(np.maximum(np.diag(hsic), 0))
  scale = own[:, None] * own[None, :]
  return np.divide(hsic, scale, out=np.zeros_like(hsic), where=scale > 0)


def chance(
  hsic: Float[np.ndarray, "E E"], shuffled: Float[np.ndarray, "E E"]
) -> dict[str, float]:
  """Returns the mean and standard deviation of CKA between unrelated experts.

  Args:
    hsic: from `probe`, for the same tokens.
    shuffled: likewise, with the tokens of the second expert in random order.
  """
  own = np.sqrt(np.maximum(np.diag(hsic), 0))
  scale = own[:, None] * own[None, :]
  pairs = ~np.eye(len(own), dtype=bool) & (scale > 0)
  values = shuffled[pairs] / scale[pairs]
  if not values.size:
    return {"mean": 0.0, "std": 0.0}
  return {"mean": float(values.mean()), "std": float(values.std())}
