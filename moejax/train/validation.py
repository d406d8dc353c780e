"""The validation loss of a run: token-weighted over a fixed set of batches."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from moejax.data.packing import Batch as HostBatch
from moejax.launch import hang
from moejax.models.loss import Batch, Sums, to_devices
from moejax.run import metrics
from moejax.types import Params

EvalStep = Callable[[Params, Batch], Sums]


def evaluate(
  eval_step: EvalStep,
  params: Params,
  batches: Iterable[HostBatch],
  mesh: jax.sharding.Mesh,
  progress: Callable[[int], None] | None = None,
) -> dict[str, Any] | None:
  """Evaluates all batches: adds up their sums, then divides once.

  Args:
    eval_step: from `step.make_eval_step`.
    params: on the devices of `mesh`.
    batches: this process's rows of every batch.
    mesh: the run's.
    progress: called with the tokens evaluated so far.

  Returns:
    loss, bits_per_byte where known, aux terms, dropped_fraction, num_tokens and
    `moe` (per layer); None if there is no valid token.
  """
  total, pending = None, None
  for batch in batches:
    sums = eval_step(params, to_devices(batch, mesh))
    # The sums of one batch are fetched while the next is computed. They are
    # added in float64: thousands of batches would lose digits in float32.
    total, pending = _add(total, pending), sums
    hang.progress()
    if progress is not None:
      progress(0 if total is None else int(total.tokens))
  total = _add(total, pending)
  if total is None or total.tokens == 0:
    return None
  values: dict[str, Any] = metrics.loss_metrics(total)
  values["num_tokens"] = int(total.tokens)
  if metrics.has_experts(total.stats):
    values["moe"] = metrics.layers_for_log(metrics.layer_metrics(total.stats))
  return values


def _add(total: Sums | None, sums: Sums | None) -> Sums | None:
  if sums is None:
    return total
  sums = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(sums))
  return sums if total is None else jax.tree.map(np.add, total, sums)
