"""How many experts, and how many slots per expert?

  python -m experiments.sweep --spec=experiments/expert_count/spec.py \
    --workdir=runs/expert_count --jobs=2

Step times: afterwards, the same with --jobs=1 --time_steps=20, so a step has all cores.

Every setting has the same active FLOPs per token: a token visits one expert of the same
width, whatever the number of experts. Only the router, a D x E matrix, grows with E.

200 steps of 8 sequences of 128 tokens (205k tokens), three seeds: a first look at the
trends, far from convergence. In so short a run, experts that see few tokens learn little,
which counts against large E.
"""

from moejax.config import Config
from moejax.sweep.points import axes
from moejax.sweep.spec import Spec

STEPS, SEQUENCES = 200, 8


def base() -> Config:
  """The default model on a text large enough for many experts, for a short run."""
  from configs import default

  config = default.get_config()
  config.data.name = "python_packages"
  config.train.num_steps, config.train.batch_size = STEPS, SEQUENCES
  config.train.eval_every = config.train.checkpoint_every = STEPS
  # The same leading text of the validation split for all: two seconds per 16k tokens.
  config.train.final_eval_tokens = 131_072
  config.train.sample = config.train.report = config.train.tensorboard = False
  return config


def get_sweep() -> Spec:
  return Spec(
    base=base(),
    axes=(
      axes.product("moe.num_experts", 4, 8, 16, 32, 64),
      axes.product("moe.capacity_factor", 0.75, 1.0, 1.25, 2.0, None),
    ),
    seeds=(0, 1, 2),
    match="active_flops",
  )
