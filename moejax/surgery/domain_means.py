"""The mean input of a layer on a text: router rows for experts trained apart.

FlexOlmo (arXiv:2507.07024) initialises the router row of an expert with the mean
embedding of its domain's documents, from a separate embedding model. Here each run reads
its own text instead, and the mean is that of the feed-forward's inputs, after the norm.
The rows are then centred over the runs and scaled to the same norm: what all domains
have in common does not help to route a token.

Letters: B batch, S sequence, D width, R runs.
"""

from collections.abc import Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from moejax.analysis.layerwise import Layerwise
from moejax.surgery.measured import Text


def means(text: Text, layers: Collection[int]) -> dict[int, Float[np.ndarray, "D"]]:
  """Returns the mean input of the feed-forward of each layer, over the tokens of a text.

  Args:
    text: a decoder and its text.
    layers: numbers of the layers.
  """
  run, count = Layerwise(text.model, text.params, text.mesh, None), 0.0
  total = {layer: np.zeros(text.model.config.width) for layer in layers}
  with jax.set_mesh(text.mesh):
    for batch in text.batches():
      valid = batch["segment_ids"] > 0
      count += float(jnp.sum(valid))
      x, inputs = run.begin(batch)
      for layer in range(max(layers) + 1):
        x = run.attend(layer, x, inputs)
        if layer in total:
          found = _sum(run.normed(layer, x, inputs), valid)
          total[layer] += np.asarray(found, np.float64)
        x, _ = run.feed(layer, x, inputs)
  return {layer: found / max(count, 1.0) for layer, found in total.items()}


@jax.jit
def _sum(x: Float[Array, "B S D"], valid: Bool[Array, "B S"]) -> Float[Array, "D"]:
  return jnp.sum(jnp.where(valid[..., None], x.astype(jnp.float32), 0.0), (0, 1))


def router_rows(
  of_runs: Sequence[Mapping[int, Float[np.ndarray, "D"]]], scale: float
) -> dict[int, Float[np.ndarray, "D R"]]:
  """Returns router weights of each layer: centred means, all with the same norm.

  Args:
    of_runs: the result of `means` for each run.
    scale: the norm; a row is zero if its mean does not differ from the others.
  """
  found = {}
  for layer in of_runs[0]:
    rows = np.stack([run[layer] for run in of_runs], axis=1)
    rows = rows - rows.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(rows, axis=0)
    found[layer] = scale * np.divide(
      rows, norms, where=norms > 0, out=np.zeros_like(rows)
    )
  return found
