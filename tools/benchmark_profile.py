"""Checks a profile: the parts of a train step against the same parts timed alone.

  python -m tools.benchmark_profile --config=configs/default.py --rounds=8

Each part that can run alone is compiled alone, forward and backward, on one device and
random tokens. A round traces one step, then times every part once, so that a busy machine
slows both. Prints medians and minima over the rounds, in milliseconds per step, and
their ratios: on a machine with other work the minima say more.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from moejax import parts
from moejax.cli import arguments
from moejax.cli import flags as cli
from moejax.run import timing
from tools.benchmark_step import Stepper, load_config

EXPERTS = (parts.DISPATCH, parts.EXPERTS, parts.COMBINE)


def parse(argv: list[str]) -> argparse.Namespace:
  parser = cli.Parser(__doc__)
  parser.add_argument("--config", default="configs/default.py", help="a config file")
  parser.add_argument("--cores", type=arguments.at_least(0), default=2)
  parser.add_argument("--rounds", type=arguments.at_least(1), default=8)
  return parser.parse_args(argv)


class Alone:
  """The parts of one model, each a compiled function that takes no argument."""

  def __init__(self, config: Any, stepper: Stepper):
    import jax
    import jax.numpy as jnp

    from moejax.layers.block import CallOptions
    from moejax.models.make import make_model

    vocab_size = config.model.vocab_size or config.data.vocab_size
    self._config = config
    self._model = make_model(config.model, config.moe, vocab_size=vocab_size)
    # A copy, since the step donates its state.
    self._params = jax.tree.map(jnp.copy, stepper.state["params"])
    self._tokens = jnp.asarray(stepper.batch["inputs"])
    self._targets = jnp.asarray(stepper.batch["targets"])
    self._options = CallOptions(train=True, capacity_factor=config.moe.capacity_factor)
    self._x, self._inputs, _ = jax.jit(
      lambda p: self._model.begin(p, self._tokens, self._options)
    )(self._params)
    self._paths = self._model.stack.paths

  def functions(self) -> dict[tuple[str, ...], Callable[[], Any]]:
    """Returns each group of parts with a function that does its work of one step."""
    return {
      (parts.ATTENTION,): self._blocks("attention", self._attention),
      (parts.FEED_FORWARD,): self._blocks("feed_forward", self._feed_forward),
      EXPERTS: self._experts(),
      (parts.HEAD, parts.LOSS): self._head(),
      (parts.OPTIMIZER,): self._optimizer(),
    }

  def _attention(self, block: Any, inputs: Any, x: Any) -> Any:
    return block.attention(x, inputs.context, None)[0]

  def _feed_forward(self, block: Any, inputs: Any, x: Any) -> Any:
    del inputs
    return block.feed_forward(x)

  def _blocks(self, name: str, call: Callable[[Any, Any, Any], Any]) -> Callable:
    """Runs one module of every block that has it."""
    having = [p for p in self._paths if name in self._params[p.part][p.name]]
    own = {p: self._params[p.part][p.name][name] for p in having}
    xs = {p: self._x * (1 + index / 8) for index, p in enumerate(having)}

    def run(own: Any, xs: Any, params: Any) -> Any:
      found = []
      for path in having:
        block = params[path.part][path.name] | {name: own[path]}
        whole = params | {path.part: params[path.part] | {path.name: block}}
        module, inputs = self._model.stack.block(whole, self._inputs, path)
        found.append(call(module, inputs, xs[path]))
      return found

    back = [self._x] * len(having)
    return _both(run, back, own, xs, self._params)

  def _experts(self) -> Callable:
    import jax
    import jax.numpy as jnp

    from moejax.exchange import run as exchange

    having = [p for p in self._paths if "moe" in self._params[p.part][p.name]]
    size = self._config.moe.group_size or self._x.shape[1]
    tokens = self._x.reshape(-1, size, self._x.shape[-1])
    valid = jnp.ones(tokens.shape[:2], bool)
    ids = self._tokens.reshape(valid.shape)

    def layer(path: Any, params: Any) -> Any:
      return self._model.stack.block(params, self._inputs, path)[0].moe

    def place_all(params: Any) -> Any:
      factor = self._options.capacity_factor
      same = {"key": jax.random.key(0), "capacity_factor": factor}
      routers = [layer(path, params).router for path in having]
      return [router(tokens, valid, ids, None, **same)[1].placement for router in routers]

    placements = jax.jit(place_all)(self._params)
    weights = jax.jit(
      lambda p: [layer(q, p).experts.weights(tokens.dtype) for q in having]
    )(self._params)
    options = [layer(p, self._params).options for p in having]

    def run(weights: Any, xs: Any, placements: Any) -> Any:
      return [
        exchange.run(xs[index], placement, weights[index], options[index])[0]
        for index, placement in enumerate(placements)
      ]

    xs = [tokens * (1 + index / 8) for index in range(len(having))]
    return _both(run, xs, weights, xs, placements)

  def _head(self) -> Callable:
    import jax.numpy as jnp

    from moejax.models.loss import cross_entropy

    def loss(embedding: Any, x: Any) -> Any:
      logits = self._model.finish({"embedding": embedding}, x)
      return jnp.mean(cross_entropy(logits, self._targets))

    return _both(
      lambda embedding, x, _: loss(embedding, x),
      jnp.float32(1.0),
      *(self._params["embedding"], self._x, None),
    )

  def _optimizer(self) -> Callable:
    import jax
    import jax.numpy as jnp
    import optax

    from moejax.models import trained
    from moejax.train.optimizer import make_optimizer

    optimizer = make_optimizer(
      self._config.optimizer,
      num_steps=self._config.train.num_steps,
      axes=self._model.logical_axes(),
      trained=self._model.trained(),
    )
    gradients, _ = trained.split(self._params, self._model.trained())
    rate = jnp.float32(1e-3)

    def update(gradients: Any, state: Any, params: Any) -> Any:
      norm = optax.tree.norm(gradients)
      new = optimizer.apply(
        gradients, state, params, learning_rate=rate, gradient_norm=norm
      )
      ok = jnp.isfinite(norm)
      return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, (params, state))

    compiled = jax.jit(update)
    state = optimizer.init(self._params)
    return lambda: jax.block_until_ready(compiled(gradients, state, self._params))


def _both(
  run: Callable[[Any, Any, Any], Any], back: Any, own: Any, xs: Any, others: Any
) -> Callable:
  """Returns a function that runs a part forward, and backward from given gradients.

  Args:
    run: (own, xs, others) -> outputs.
    back: gradients of the outputs: an argument, so that the compiler does not know them.
    own: parameters, which get gradients.
    xs: inputs, which get gradients.
    others: what gets none.
  """
  import jax

  def both(own: Any, xs: Any, others: Any, back: Any) -> Any:
    outputs, pull = jax.vjp(lambda own, xs: run(own, xs, others), own, xs)
    return outputs, pull(back)

  compiled = jax.jit(both)
  return lambda: jax.block_until_ready(compiled(own, xs, others, back))


def trace_steps(stepper: Stepper, text: str) -> dict[str, float]:
  """Returns the milliseconds of each part in a step."""
  import jax

  from moejax.hlo import timeline

  with tempfile.TemporaryDirectory() as directory:
    with jax.profiler.trace(directory, profiler_options=timeline.trace_options()):
      stepper()
    [device] = timeline.of_steps(text, pathlib.Path(directory), num_steps=1, step_ms=0.0)
  return {part.name: part.total for part in device.parts}


def main(argv: list[str] | None = None) -> None:
  args = parse(sys.argv[1:] if argv is None else argv)
  timing.prepare(args.cores)
  config = load_config(args.config)
  stepper = Stepper(config)
  alone = Alone(config, stepper).functions()
  for function in (stepper, *alone.values()):
    function()
  text = stepper.compiled.as_text()
  traced: dict[tuple[str, ...], list[float]] = {group: [] for group in alone}
  timed: dict[tuple[str, ...], list[float]] = {group: [] for group in alone}
  for _ in range(args.rounds):
    found = trace_steps(stepper, text)
    for group, function in alone.items():
      traced[group].append(sum(found.get(name, 0.0) for name in group))
      before = time.perf_counter()
      function()
      timed[group].append(1e3 * (time.perf_counter() - before))
  for what, middle in (("median", statistics.median), ("least", min)):
    print(f"{what:<30}{'traced ms':>10}{'alone ms':>10}{'ratio':>8}")
    for group in alone:
      inside, outside = middle(traced[group]), middle(timed[group])
      name = " + ".join(group)
      print(f"{name:<30}{inside:>10.1f}{outside:>10.1f}{inside / outside:>8.2f}")


if __name__ == "__main__":
  main()
