"""EleutherAI's lm-evaluation-harness on a run: its three kinds of requests.

`Adapter` answers them and does not need the harness. `language_model` makes it the class
that the harness expects (extra `lm-eval`), and `register` adds it as `--model moejax`.

Every text comes after the tokenizer's start, as in training and in generation. Rows are
padded to a bucket of lengths and to `batch_size` rows, so a task compiles a handful of
shapes; a row's score does not depend on the others. Scoring is dropless unless the router
needs a capacity.

Letters: B rows, S tokens with padding, V vocabulary.
Source: the interface of lm_eval 0.4.13, `lm_eval.api.model.LM`.
"""

import functools
import importlib.util
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moejax.errors import UserError
from moejax.evaluate import decoding, generation, groups
from moejax.evaluate.buckets import power_of_two
from moejax.evaluate.load import LoadedRun, load_run
from moejax.types import Params

DEFAULT_NEW_TOKENS = 256
"""Limit of a generation without one, as in the harness's own models."""

_SETTINGS = (
  "until",
  "max_gen_toks",
  "max_new_tokens",
  "do_sample",
  "temperature",
  "top_k",
  "top_p",
)
_LEAST_LENGTH = 32


@functools.partial(jax.jit, static_argnames=("model",))
def _score(
  model: Any, params: Params, tokens: Int[Array, "B S"], targets: Int[Array, "B S"]
) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
  """Returns each target's log-probability and whether it is the most probable id.

  Targets below 0 are padding.
  """
  out = model(
    params,
    tokens,
    segment_ids=(targets >= 0).astype(jnp.int32),
    capacity_factor=groups.least_factor(model),
  )
  logits = out.logits[..., : model.vocab_size]
  targets = jnp.maximum(targets, 0)
  own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  total = jax.scipy.special.logsumexp(logits, axis=-1)
  return own - total, jnp.argmax(logits, axis=-1) == targets


class Adapter:
  """A run with the harness's interface; requests are any objects with `args`."""

  def __init__(self, run: LoadedRun, *, batch_size: int = 8, truncate: bool = False):
    """Prepares a run.

    Args:
      run: from `load_run`.
      batch_size: rows per call of the model.
      truncate: whether a context that is too long loses its first tokens; otherwise it is
        an error.

    Raises:
      UserError: the run has no tokenizer, or its router does not support such requests.
    """
    if run.tokenizer is None:
      raise UserError(
        "--tasks: this run has no tokenizer, but tasks are texts. Convert the model from "
        "a folder with a tokenizer.json."
      )
    if batch_size < 1:
      raise UserError(f"--batch_size={batch_size} makes no sense: give 1 or more.")
    if run.model.config.kind == "encoder_decoder":
      raise UserError(
        "--tasks: an encoder-decoder restores spans of a text, but tasks need the "
        "continuation of a text. Give a run of a decoder."
      )
    generation.check_router(run.model)
    self.run, self.tokenizer = run, run.tokenizer
    self.max_length = generation.context_length(run.config)
    self.batch_size, self.truncate = batch_size, truncate

  # ------------------------------------------------------------------- the three methods

  def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    """Returns the log-probability of each continuation, and whether greedy decoding
    would produce it, for (context, continuation) requests.

    Raises:
      UserError: a request does not fit the context.
    """
    rows = [self._pair(*request.args) for request in requests]
    return [(float(scores.sum()), bool(best.all())) for scores, best in self._score(rows)]

  def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
    """Returns the log-probability of each whole text, however long.

    A longer text is cut into windows of the context. Each predicts tokens that no other
    does, and the last one has all the context that fits.
    """
    rows, owners = [], []
    for number, request in enumerate(requests):
      ids = self.tokenizer.encode(request.args[0])
      for row in windows(ids, self.tokenizer.start, self.max_length):
        rows.append(row)
        owners.append(number)
    totals = [0.0] * len(requests)
    for number, (scores, _) in zip(owners, self._score(rows), strict=True):
      totals[number] += float(scores.sum())
    return totals

  def generate_until(self, requests: Sequence[Any]) -> list[str]:
    """Returns the text that follows each context, up to the first of its stop texts.

    Raises:
      UserError: a context leaves no room, or a setting is unknown.
    """
    answers = [""] * len(requests)
    batches: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
      batches.setdefault(repr(sorted(request.args[1].items())), []).append(number)
    for numbers in batches.values():
      settings = _generation(requests[numbers[0]].args[1])
      prompts = {
        number: self._prompt(requests[number].args[0], settings["max_tokens"])
        for number in numbers
      }
      # Rows of similar lengths share a bucket.
      order = sorted(numbers, key=lambda number: len(prompts[number]))
      for start in range(0, len(order), self.batch_size):
        part = order[start : start + self.batch_size]
        texts = self._generate([prompts[number] for number in part], **settings)
        for number, text in zip(part, texts, strict=True):
          answers[number] = text
    return answers

  # --------------------------------------------------------------------------- in tokens

  def _pair(self, context: str, continuation: str) -> tuple[list[int], int]:
    """Returns the ids of both after the start, and the number of the continuation's.

    As in the harness, spaces at the context's end belong to the continuation, and both
    are encoded together.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    own = len(self.tokenizer.encode(stripped)) if stripped else 0
    ids = self.tokenizer.encode(stripped + continuation)
    count = len(ids) - own
    if count < 1:
      raise UserError(
        f"--tasks: the continuation {continuation!r} has no tokens of its own."
      )
    ids = [self.tokenizer.start, *ids]
    # The last id is predicted but not read.
    return self._fitting(ids, self.max_length + 1, count + 1), count

  def _prompt(self, context: str, max_tokens: int) -> list[int]:
    ids = [self.tokenizer.start, *self.tokenizer.encode(context)]
    return self._fitting(ids, max(self.max_length - max_tokens, 1), 1)

  def _fitting(self, ids: list[int], room: int, least: int) -> list[int]:
    if len(ids) <= room:
      return ids
    if self.truncate and least <= room:
      return ids[-room:]
    remedy = "Ask for fewer tokens"
    if least <= room:
      remedy = "Give --truncate to leave out the first tokens"
    raise UserError(
      f"--tasks: a request has {len(ids)} tokens, but the context of {self.max_length} "
      f"has room for {room}. {remedy}, or fewer examples."
    )

  def _score(
    self, rows: Sequence[tuple[list[int], int]]
  ) -> list[tuple[Float[np.ndarray, "n"], Bool[np.ndarray, "n"]]]:
    """Returns log-probability and greediness of the last `count` ids of each row."""
    results: list[Any] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row][0]))
    by_size: dict[int, list[int]] = {}
    for row in order:
      size = power_of_two(len(rows[row][0]) - 1, _LEAST_LENGTH)
      by_size.setdefault(size, []).append(row)
    for size, members in by_size.items():
      for start in range(0, len(members), self.batch_size):
        part = members[start : start + self.batch_size]
        tokens = np.zeros((self.batch_size, size), np.int32)
        targets = np.full((self.batch_size, size), -1, np.int32)
        for place, row in enumerate(part):
          ids = rows[row][0]
          tokens[place, : len(ids) - 1] = ids[:-1]
          targets[place, : len(ids) - 1] = ids[1:]
        found = _score(
          self.run.model, self.run.params, jnp.asarray(tokens), jnp.asarray(targets)
        )
        scores, best = (np.asarray(array) for array in found)
        for place, row in enumerate(part):
          ids, count = rows[row]
          own = slice(len(ids) - 1 - count, len(ids) - 1)
          results[row] = scores[place, own].astype(np.float64), best[place, own]
    return results

  def _generate(
    self,
    prompts: Sequence[list[int]],
    *,
    until: Sequence[str],
    max_tokens: int,
    how: decoding.Sampling,
  ) -> list[str]:
    def is_done(row: int, ids: list[int]) -> bool:
      del row
      text = self.tokenizer.decode(ids)
      return any(stop in text for stop in until)

    # The same number of rows in every call, so that it is compiled once.
    padding = [[self.tokenizer.start]] * (self.batch_size - len(prompts))
    decoded = self._engine.run(
      [*prompts, *padding],
      [max_tokens] * len(prompts) + [1] * len(padding),
      how=how,
      stop=[self.tokenizer.separator],
      allowed=generation.allowed_ids(self.tokenizer, self.run.model.vocab_size),
      is_done=is_done if until else None,
    )
    answers = []
    for ids in decoded.tokens[: len(prompts)]:
      if ids and ids[-1] == self.tokenizer.separator:
        ids = ids[:-1]
      text = self.tokenizer.decode(ids)
      ends = [text.index(stop) for stop in until if stop in text]
      answers.append(text[: min(ends)] if ends else text)
    return answers

  @functools.cached_property
  def _engine(self) -> decoding.Engine:
    return decoding.Engine(self.run.model, self.run.params)


def windows(ids: list[int], start: int, length: int) -> list[tuple[list[int], int]]:
  """Cuts a text into rows that predict each of its ids once.

  Args:
    ids: of the text.
    start: id before the text.
    length: maximum number of ids that the model reads.

  Returns:
    Rows of at most `length` + 1 ids, each with the number of its last ids to predict.
  """
  everything, rows, done = [start, *ids], [], 0
  while done < len(ids):
    count = min(length, len(ids) - done)
    done += count
    rows.append((everything[max(done - length, 0) : done + 1], count))
  return rows


def _generation(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Reads a request's settings.

  Raises:
    UserError: a setting is unknown.
  """
  unknown = sorted(set(settings) - set(_SETTINGS))
  if unknown:
    raise UserError(
      f"--tasks: generation_kwargs has {', '.join(unknown)}, but only "
      f"{', '.join(_SETTINGS)} are known."
    )
  until = settings.get("until") or []
  until = [until] if isinstance(until, str) else [stop for stop in until if stop]
  wanted = settings.get("max_gen_toks", settings.get("max_new_tokens"))
  samples = settings.get("do_sample", bool(settings.get("temperature")))
  temperature = float(settings.get("temperature", 1.0)) if samples else 0.0
  return {
    "until": until,
    "max_tokens": DEFAULT_NEW_TOKENS if wanted is None else int(wanted),
    "how": decoding.Sampling.of(
      temperature, int(settings.get("top_k", 0)), float(settings.get("top_p", 1.0))
    ),
  }


# ------------------------------------------------------------------------- in the harness


@functools.cache
def language_model() -> type[Any]:
  """Returns the class that the harness calls; its arguments are strings or values.

  Raises:
    UserError: lm_eval is not installed.
  """
  try:
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]  # An extra.
  except ImportError as error:
    raise UserError(
      f"--tasks needs lm_eval, which does not import ({error}). Install it with "
      "`pip install 'moejax[lm-eval]'`."
    ) from error

  class LanguageModel(Adapter, LM):
    """`--model moejax --model_args workdir=RUN`; each process answers its share."""

    def __init__(
      self,
      workdir: str,
      *,
      step: int | None = None,
      batch_size: int | str = 8,
      truncate: bool = False,
      max_batch_size: int | None = None,
      device: str | None = None,
    ):
      # The harness gives both to every model.
      del max_batch_size, device
      LM.__init__(self)
      check_torch(jax.process_count())
      size = 8 if batch_size == "auto" else int(batch_size)
      run = load_run(workdir, None if step is None else int(step))
      Adapter.__init__(self, run, batch_size=size, truncate=truncate)
      self._rank, self._world_size = jax.process_index(), jax.process_count()

    def gather_object(self, obj: Any, dst: int = 0) -> Any:  # None, except on dst.
      gathered = _gather(obj)
      return gathered if self._rank == dst else None

    def all_gather(self, tensor: Any) -> Any:
      return type(tensor).new_tensor(tensor, _gather(tensor.tolist()))

    def barrier(self) -> None:
      _gather(None)

  return LanguageModel


def check_torch(count: int) -> None:
  """Checks that the harness can count the requests of several processes.

  Raises:
    UserError: it cannot: it counts in torch, which its installation does not include.
  """
  if count > 1 and importlib.util.find_spec("torch") is None:
    raise UserError(
      f"--tasks in {count} processes: lm_eval itself needs torch for that. Install it "
      "with `pip install torch`, or start one process."
    )


def register() -> None:
  """Makes `moejax` a model of the harness, in this process."""
  from lm_eval.api import registry  # pyright: ignore[reportMissingImports]  # An extra.

  registry.register_model("moejax")(language_model())


def _gather(value: Any) -> list[Any]:
  """Returns the values of all processes, in order."""
  if jax.process_count() == 1:
    return [value]
  from jax.experimental import multihost_utils

  raw = np.frombuffer(pickle.dumps(value), np.uint8)
  sizes = multihost_utils.process_allgather(np.asarray([raw.size], np.int32)).reshape(-1)
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: raw.size] = raw
  everything = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
  return [
    pickle.loads(bytes(row[:size])) for row, size in zip(everything, sizes, strict=True)
  ]
