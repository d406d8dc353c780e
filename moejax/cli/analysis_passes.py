"""The passes of an analysis over the text, in order; every process runs all of them."""

import contextlib
import dataclasses
import math
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from moejax.analysis import (
  collect,
  decide,
  knockout,
  probe,
  replay,
  report,
  saturation,
  sentences,
  sides,
  summary,
  trace,
)
from moejax.analysis.explorer.facts import Names
from moejax.analysis.explorer.sample import Sample, Sampler
from moejax.checkpoint.manager import restore_params
from moejax.cli import restored
from moejax.config.spans import target_length
from moejax.errors import UserError
from moejax.models.placement import param_shardings
from moejax.run import progress as progress_lib
from moejax.run import results
from moejax.sharding import rules

Progress = Callable[[int], None]
REPLAY_FILE = "replay.json"


def analyze(request: restored.Request, asked: restored.Asked) -> None:
  """Runs the requested passes and writes the results."""
  settings = replay.settings(asked.replay) if asked.replay else []

  def prepare(run: restored.Run) -> restored.Run:
    _check(run, asked, settings)
    return _with_whole_groups(run, settings)

  run = restored.restore(request, prepare)
  if run.tells and (left_out := sentences.left_out(run.facts)):
    print(left_out)
  if asked.from_trace:
    _from_trace(run, asked, settings)
    return
  found, replayer, sample = _collected(run, asked, settings)
  if "stacks" not in found:
    _merge(found, probe.probe(**run.arguments()))
  if len(run.steps) > 1:
    found["saturation"] = _saturation(run, request, asked.limit)
  if replayer is not None:
    found["replay"] = _confirmed(run, asked, replayer.result())
  if asked.knockout is not None:
    found |= _knockout(run, asked)
  if run.tells:
    dataset = run.dataset
    names = Names(pieces=dataset.tokenizer.pieces, domains=list(dataset.domains))
    paths = report.write(found, asked.out, sample, names)
    for line in (*sentences.sentences(found), *paths):
      print(line)


def _check(run: restored.Run, asked: restored.Asked, settings: list[Any]) -> None:
  """Rejects, before anything is compiled, a request that would fail later."""
  model = run.model
  if run.config.model.kind == "encoder_decoder":
    _check_encoder(asked, len(run.steps))
  if settings:
    replay.check(model)
    for setting in settings:
      replay.configured(run.config, setting)
  if asked.confirm > len(settings):
    raise UserError(
      f"--confirm={asked.confirm}: there are only {len(settings)} combinations. Give at "
      "most that many."
    )
  if asked.from_trace:
    trace.read_meta(asked.from_trace)
  if asked.knockout is not None:
    layers = asked.knockout or model.moe_layers
    if wrong := [layer for layer in layers if layer not in model.moe_layers]:
      there = ", ".join(map(str, model.moe_layers))
      raise UserError(
        f"--knockout={wrong[0]}: this is not an MoE layer of the model. Choose from "
        f"{there}."
      )
    largest = 2 if asked.knockout_pairs else 1
    knockout.check(model, asked.knockout_tokens, largest)
  if asked.trace:
    tokens = _covered(run, asked.limit)
    trace.check(model, asked.trace, tokens, asked.trace_what)
    if run.tells:
      size = trace.num_bytes(model, tokens, asked.trace_what) / 2**20
      print(f"{asked.trace}: at most {size:,.1f} MiB before compression")


def _check_encoder(asked: restored.Asked, num_steps: int) -> None:
  """Rejects measurements that are only made for decoder-only models."""
  given = {
    "replay": asked.replay,
    "knockout": asked.knockout,
    "trace": asked.trace,
    "from_trace": asked.from_trace,
    "steps": num_steps > 1,
  }
  for name, value in given.items():
    if value not in (None, False):
      what = "more than one checkpoint" if name == "steps" else "that"
      raise UserError(
        f"--{name}: {what} is not analyzed for an encoder-decoder. Leave it out: loads, "
        "choices, preferences, drops and consistency of both stacks are."
      )


def _with_whole_groups(run: restored.Run, settings: list[Any]) -> restored.Run:
  """Returns the run with batches that hold whole groups of every setting."""
  if not settings:
    return run
  more = replay.batch_multiple(run.config, run.mesh, settings)
  return dataclasses.replace(run, batch_size=math.lcm(run.batch_size, more))


def _collected(
  run: restored.Run, asked: restored.Asked, settings: list[Any]
) -> tuple[dict[str, Any], replay.Replay | None, Sample | None]:
  """Returns facts and measures from one pass, which a trace and a replay share."""
  words = collect.vocabulary(run.token_counts())
  if run.config.model.kind == "encoder_decoder":
    return run.facts | _both_stacks(run, words, asked.limit), None, None
  replayer, sampler = None, None
  visits: list[collect.Visit] = []
  with contextlib.ExitStack() as stack:
    if settings:
      replayer = replay.Replay(run.config, run.model, run.mesh, settings)
      visits.append(_seen_by(replayer, run))
    if asked.trace:
      visits.append(stack.enter_context(_recording(run, asked.trace, asked.trace_what)))

    if asked.explore_tokens:
      sampler = _sampler(run, asked)
      visits.append(sampler.see)

    def visit(routes: Any, kept: Any, batch: Any) -> None:
      for each in visits:
        each(routes, kept, batch)

    with _watched(run, "routes", asked.limit) as progress:
      sums = collect.collect(
        words=words,
        limit=asked.limit,
        progress=progress,
        visit=visit if visits else None,
        **run.arguments(),
      )
  domains, pieces = list(run.dataset.domains), run.dataset.tokenizer.pieces
  found = run.facts | summary.summarise(sums, run.model, words, domains, pieces)
  return found, replayer, None if sampler is None else sampler.result()


def _both_stacks(
  run: restored.Run, words: collect.Vocabulary, limit: int
) -> dict[str, Any]:
  """Returns the measures of an encoder-decoder, from a pass for each stack."""
  domains, pieces = list(run.dataset.domains), run.dataset.tokenizer.pieces
  found = {}
  for side in sides.sides(run.model):
    # An encoder reads more tokens than the counted targets, so it finishes earlier.
    with _watched(run, f"routes of the {side.name}", limit) as progress:
      sums = collect.collect(
        words=words, limit=limit, side=side, progress=progress, **run.arguments()
      )
    found[side.name] = summary.summarise(sums, side, words, domains, pieces)
  return summary.joined(found)


def _sampler(run: restored.Run, asked: restored.Asked) -> Sampler:
  return Sampler(
    run.mesh,
    tokens=asked.explore_tokens,
    length=run.config.data.sequence_length,
    total=_covered(run, asked.limit),
  )


def _seen_by(replayer: replay.Replay, run: restored.Run) -> collect.Visit:
  record = replay.make_recorder(run.model, run.mesh)

  def visit(routes: Any, kept: Any, batch: Any) -> None:
    del kept
    replayer.see(*record(run.params, routes, batch))

  return visit


@contextlib.contextmanager
def _recording(
  run: restored.Run, path: pathlib.Path, what: str
) -> Iterator[collect.Visit]:
  """Writes a trace: all processes gather data, and the first one writes it."""
  gather = jax.jit(lambda tree: tree, out_shardings=rules.replicated(run.mesh))
  meta = _trace_meta(run)
  if not run.tells:
    yield lambda routes, _, batch: jax.block_until_ready(gather((routes, batch)))
    return
  with trace.writing(path, run.model, meta, what) as writer:
    yield lambda routes, _, batch: writer.write(*jax.device_get(gather((routes, batch))))
  print(path)


def _trace_meta(run: restored.Run) -> dict[str, Any]:
  names = ("workdir", "step", "split", "text", "dataset_fingerprint")
  return {name: run.facts[name] for name in names} | {
    "router": run.model.moe.router,
    "layers": list(run.model.moe_layers),
    "num_experts": run.model.moe.fine_experts,
    "routers": trace.identity(run.model, run.params, run.mesh),
  }


def _from_trace(run: restored.Run, asked: restored.Asked, settings: list[Any]) -> None:
  """Replays a trace, prints a table and writes replay.json."""
  assert asked.from_trace is not None
  if jax.process_count() > 1:
    raise UserError("--from_trace: a trace is replayed by one process. Start only one.")
  path = asked.from_trace
  trace.check_meta(path, trace.read_meta(path), _trace_meta(run))
  replayer = replay.Replay(run.config, run.model, run.mesh, settings)
  own = jax.jit(lambda params: decide.router_params(run.model, params))(run.params)
  table = jax.jit(lambda p, ids: decide.assigned_experts(run.model, p, ids))
  length = run.config.data.sequence_length
  place = rules.batch_sharding(run.mesh)
  total, done = trace.num_tokens(path), 0
  with (
    jax.set_mesh(run.mesh),
    _watched(run, f"tokens of {path.name}", 0, total) as progress,
  ):
    for rows in trace.read(path, run.model, batch_size=run.batch_size, length=length):
      done += int(rows["valid"].sum())
      logits = rows.pop("logits")
      batch = {name: jax.device_put(value, place) for name, value in rows.items()}
      recorded = decide.Recorded(
        logits=jnp.asarray(logits),
        assigned=table(run.params, batch["token_ids"]),
        **batch,
      )
      replayer.see(recorded, own)
      progress(done)
    found = replayer.result()
  asked.out.mkdir(parents=True, exist_ok=True)
  results.write(asked.out / REPLAY_FILE, run.facts | {"replay": found})
  print(replay.table(found))
  print(asked.out / REPLAY_FILE)


def _merge(found: dict[str, Any], probed: dict[str, Any]) -> None:
  """Adds the probe's results for each layer to that layer."""
  for layer, more in zip(found["layers"], probed["layers"], strict=True):
    layer["experts"] = {k: v for k, v in more.items() if k != "layer"}
  found["super_experts"] = probed["super_experts"]


def _saturation(
  run: restored.Run, request: restored.Request, limit: int
) -> list[dict[str, Any]]:
  """Returns how far each earlier checkpoint agrees with the analyzed one."""
  step = saturation.make_step(run.model, run.mesh)
  shardings = param_shardings(run.model, run.mesh)
  rows = []
  with _watched(run, "checkpoints", 0, len(run.steps)) as progress:
    for number, earlier in enumerate(run.steps):
      if earlier == run.facts["step"]:
        params = run.params
      else:
        params, _, _ = restore_params(request.workdir, earlier, shardings)
      what = run.arguments() | {"params": params, "later": run.params}
      layers = saturation.compare(step, limit=limit, **what)
      rows.append({"step": earlier, "layers": layers})
      progress(number + 1)
  return rows


def _confirmed(
  run: restored.Run, asked: restored.Asked, replayed: list[dict[str, Any]]
) -> list[dict[str, Any]]:
  """Adds real evaluations of the first replayed settings."""
  what = run.arguments()
  del what["model"]
  for entry in replayed[: asked.confirm]:
    entry["confirmed"] = replay.confirm(
      run.config, replayed=entry, limit=asked.limit, **what
    )
  return replayed


def _knockout(run: restored.Run, asked: restored.Asked) -> dict[str, Any]:
  layers = asked.knockout or run.model.moe_layers
  sets = knockout.singles(run.model, layers)
  how = {"fallback": asked.knockout_tokens, "limit": asked.limit} | run.arguments()
  with _watched(run, "knock-out", asked.limit) as progress:
    single = knockout.knock_out(sets=sets, progress=progress, **how)
  found: dict[str, Any] = {"knockout": knockout.table(single, asked.knockout_tokens)}
  if asked.knockout_pairs:
    pairs = knockout.pairs(single, asked.knockout_pairs)
    with _watched(run, "pairs", asked.limit) as progress:
      double = knockout.knock_out(sets=pairs, progress=progress, **how)
    found["knockout_pairs"] = knockout.pair_table(single, double, pairs)
  return found


def _covered(run: restored.Run, limit: int) -> int:
  """Returns the number of tokens that are read; for an encoder-decoder, of targets."""
  total = run.dataset.num_tokens(run.split)
  length = target_length(run.config.data)
  return min(limit * run.batch_size * length or total, total)


@contextlib.contextmanager
def _watched(
  run: restored.Run, name: str, limit: int, total: int = 0
) -> Iterator[Progress]:
  """Shows progress on stderr, in tokens unless there is another total."""
  reporter = progress_lib.make_reporter(
    0, process_index=0 if run.tells else 1, stream=sys.stderr
  )
  unit = name if total else f"{name}, tokens"
  try:
    with progress_lib.watched(reporter, unit, total or _covered(run, limit)) as progress:
      yield progress
  finally:
    reporter.close()
