"""Tables of counts: the dependence of rows and columns, and its value by chance.

Letters: I rows, J columns.
"""

import numpy as np
from jaxtyping import Float, Int, Num


def lift(
  together: Num[np.ndarray, "I J"],
  rows: Num[np.ndarray, "I"],
  columns: Num[np.ndarray, "J"],
  total: int,
) -> Float[np.ndarray, "I J"]:
  """Returns N_ij N / (N_i N_j): 1 is independence; 0 where a row or column is empty."""
  expected = rows[:, None].astype(np.float64) * columns[None, :] / max(total, 1)
  out = np.zeros(together.shape)
  return np.divide(together, expected, out=out, where=expected > 0)


def mutual_information(table: Num[np.ndarray, "I J"]) -> float:
  """Returns the mutual information of a table's row and column, in nats.

  sum_ij p_ij log(p_ij / (p_i p_j)): 0 to min(H(row), H(column)).
  """
  joint = table / max(table.sum(), 1)
  alone = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
  seen = joint > 0
  return float(max(np.sum(joint[seen] * np.log(joint[seen] / alone[seen])), 0.0))


def entropy(counts: Num[np.ndarray, "J"]) -> float:
  """Returns the entropy of a distribution given by counts, in nats."""
  share = counts[counts > 0] / max(counts.sum(), 1)
  return float(-np.sum(share * np.log(share)))


def shuffled(
  rows: Int[np.ndarray, "I"],
  columns: Int[np.ndarray, "J"],
  rng: np.random.Generator,
) -> Int[np.ndarray, "I J"]:
  """Draws a table with the given sums as if assignments had been shuffled over tokens.

  Every assignment keeps its column (the token's id or domain), and the rows (experts) are
  reassigned at random: a multivariate hypergeometric draw, column by column.

  Args:
    rows: sums of the rows.
    columns: sums of the columns, with the same total.
    rng: randomness.
  """
  left = rows.astype(np.int64).copy()
  out = np.zeros((len(rows), len(columns)), np.int64)
  for j in np.flatnonzero(columns):
    count = int(min(columns[j], left.sum()))
    # "marginals" needs little memory for large counts.
    out[:, j] = rng.multivariate_hypergeometric(left, count, method="marginals")
    left -= out[:, j]
  return out
