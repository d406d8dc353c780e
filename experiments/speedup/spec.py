"""How much sooner does a sparse model reach its dense twin's final loss?

  python -m experiments.sweep --spec=experiments/speedup/spec.py \
    --workdir=runs/speedup --jobs=2 --time_steps=30

Switch Transformers (arXiv:2101.03961, section 3.1, figure 5) reports up to 7x in steps.
Here every layer is an MoE layer of fine-grained experts, of which a token visits four;
the dense twin has the same active FLOPs outside the router. Both sides see the same text
in the same order, and the learning rate of each is tuned over the same values.
"""

from configs import default
from moejax.config import Config

STEPS = 1500


def base() -> Config:
  config = default.get_config()
  config.data.name = "python_packages"
  config.moe.every, config.moe.offset = 1, 0
  config.moe.segments = 4
  config.moe.capacity_factor = None
  config.moe.use_router("sigmoid_bias", bias_update_rate=0.01)
  config.moe.renormalize = "before_drop"
  config.moe.balance_weight = 0.0
  config.optimizer.name = "adamw"
  config.train.num_steps = STEPS
  config.train.eval_every, config.train.eval_batches = 100, 16
  config.train.checkpoint_every = STEPS
  config.train.final_eval_tokens = 131_072
  config.train.sample = config.train.report = config.train.tensorboard = False
  return config
