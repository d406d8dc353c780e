"""A tiny model, tokenizer and dataset that the evaluation tests share."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import Config, DataConfig, ModelConfig, MoEConfig, TrainConfig
from moejax.data.tokenizer import ByteTokenizer
from moejax.models.decoder import Decoder
from moejax.types import Params

LENGTH = 32


def config(**changes) -> Config:
  """One layer, MoE. Keys are model__width, moe__num_experts and so on."""
  made = Config(
    data=DataConfig(sequence_length=LENGTH),
    model=ModelConfig(num_layers=1, width=16, num_heads=4, hidden=32),
    moe=MoEConfig(
      num_experts=4,
      num_selected=2,
      hidden=16,
      router="top_k",
      dispatcher="gather",
      every=1,
    ),
    train=TrainConfig(batch_size=8),
  )
  for name, value in changes.items():
    section, field = name.split("__")
    setattr(getattr(made, section), field, value)
  return made


@functools.cache
def model_and_params(**changes) -> tuple[Decoder, Params]:
  """A model and random parameters, drawn by numpy: compiling `init` is the dear part."""
  made = config(**changes)
  model = Decoder(made.model, made.moe, vocab_size=ByteTokenizer.vocab_size)
  rng = np.random.default_rng(0)

  def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    values = rng.normal(size=leaf.shape) * made.model.width**-0.5
    return jnp.asarray(values, leaf.dtype)

  return model, jax.tree.map(draw, model.shapes())


class TinyDataset:
  """Documents of two domains in packed sequences, as `moejax.data` serves them."""

  domains = ("left", "right")
  tokenizer = ByteTokenizer()
  token_bytes = tokenizer.bytes_per_token

  def __init__(self, texts: list[tuple[bytes, int]], length: int = LENGTH):
    inputs, targets, segments, positions, domain = [], [], [], [], []
    for number, (text, index) in enumerate(texts):
      ids = list(text)
      separator = self.tokenizer.separator
      inputs += [separator, *ids]
      targets += [*ids, separator]
      segments += [number + 1] * (len(ids) + 1)
      positions += range(len(ids) + 1)
      domain += [index] * (len(ids) + 1)
    rows = -(-len(inputs) // length)
    columns = (inputs, targets, segments, positions, domain)
    names = ("inputs", "targets", "segment_ids", "positions", "domain")
    self.arrays = {
      name: np.pad(
        np.asarray(column, np.int32), (0, rows * length - len(column))
      ).reshape(rows, length)
      for name, column in zip(names, columns, strict=True)
    }

  def num_tokens(self, split: str) -> int:
    del split
    return int((self.arrays["segment_ids"] > 0).sum())

  def eval_batches(
    self,
    split: str,
    batch_size: int,
    limit: int = 0,
    rows: np.ndarray | None = None,
  ) -> Iterator[dict[str, np.ndarray]]:
    del split
    assert rows is None or len(rows) == batch_size  # one process has them all
    count = len(next(iter(self.arrays.values())))
    for number, start in enumerate(range(0, count, batch_size)):
      if limit and number == limit:
        return
      missing = max(0, start + batch_size - count)
      yield {
        name: np.pad(array[start : start + batch_size], ((0, missing), (0, 0)))
        for name, array in self.arrays.items()
      }
