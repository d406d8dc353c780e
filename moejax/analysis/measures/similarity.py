"""Similarity of experts: of what they compute, and of their weights.

Letters: E experts, n tokens, D width.
"""

import numpy as np
from jaxtyping import Float


def cka(hsic: Float[np.ndarray, "E E"]) -> Float[np.ndarray, "E E"]:
  """Returns linear CKA of two experts' outputs for the same tokens: 1 is the same up to
  rotation and scale, 0 is unrelated; estimates of unrelated outputs scatter around 0.

  CKA_ij = HSIC_ij / sqrt(HSIC_ii HSIC_jj) (Kornblith et al. 2019, arXiv:1905.00414), with
  the unbiased HSIC summed over batches (Nguyen et al. 2021, arXiv:2010.15327, section
  3.1), so that it does not rise with few tokens.

  Args:
    hsic: from `probe`.
  """
  own = np.sqrt(np.maximum(np.diag(hsic), 0))
  scale = own[:, None] * own[None, :]
  return np.divide(hsic, scale, out=np.zeros_like(hsic), where=scale > 0)
