"""Parameters and FLOPs per token of a configuration, by part, beside its dense twin.

  python -m tools.count --config=configs/default.py [--config.moe.num_experts=16] [--json]

Reads no data, and builds no arrays. FLOPs are of training (3 times the forward pass), by
the conventions of moejax/cost/flops.py. The dense twin is the model of
`--config.moe.dense_twin`: every MoE layer becomes a dense one of hidden width
K*F + shared, so its feed-forward costs the same per token. The router is the only
extra cost of the MoE.
"""

import json
from typing import Any

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from moejax.cli import flags as cli
from moejax.config import Config
from moejax.cost import flops as plan_flops
from moejax.cost import parameters as plan_parameters
from moejax.cost.attention import cache_numbers_per_token
from moejax.models.frozen_count import count_frozen

_JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of a table.")
_CAUSAL = flags.DEFINE_bool(
  "causal",
  False,
  "Count only the attention pairs that a causal mask keeps, not the full square.",
)

_PARTS = (
  "embedding",
  "attention",
  "attention_scores",
  "dense",
  "experts",
  "shared_experts",
  "router",
  "norms",
  "head",
)
_TABLE_WIDTH = 160


def count(config: Config, *, causal: bool = False) -> dict[str, Any]:
  """Returns all numbers that the tool prints for a config, without its dense twin."""
  vocab_size = plan_parameters.resolve_vocab_size(config)
  total, active = plan_parameters.count_parameters(config, vocab_size)
  training = plan_flops.flops_per_token(config, vocab_size, causal=causal)
  parts = {
    part: {
      "total": total.get(part, 0),
      "active": active.get(part, 0),
      "flops_per_token": training.get(part, 0.0),
    }
    for part in _PARTS
  }
  return {
    "total": total["total"],
    "active": active["total"],
    "flops_per_token": training["total"],
    "parts": parts,
    "vocab_size": vocab_size,
    "sequence_length": config.data.sequence_length,
    "attention_pairs": "causal" if causal else "full",
    "cache_numbers_per_token": cache_numbers_per_token(config.model),
  }


def feed_forward_flops(counted: dict[str, Any]) -> float:
  """Returns training FLOPs per token of all feed-forward layers, without routers."""
  parts = counted["parts"]
  names = ("dense", "experts", "shared_experts")
  return sum(parts[name]["flops_per_token"] for name in names)


def make_table(moe: dict[str, Any], twin: dict[str, Any]) -> Table:
  table = Table(box=box.SIMPLE_HEAD)
  # Folded on a narrow terminal, so that no number loses its last digits.
  table.add_column("part", overflow="fold")
  headers = ("total", "active", "FLOPs/token", "twin total", "twin FLOPs/token")
  for header in headers:
    table.add_column(header, justify="right", overflow="fold")

  def cells(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    numbers = (
      a["total"],
      a["active"],
      a["flops_per_token"],
      b["total"],
      b["flops_per_token"],
    )
    return [f"{number:,.0f}" if number else "-" for number in numbers]

  for part in _PARTS:
    table.add_row(part, *cells(moe["parts"][part], twin["parts"][part]))
  table.add_section()
  table.add_row("total", *cells(moe, twin), style="bold")
  return table


def main() -> None:
  config = cli.get_config()
  counted = count(config, causal=_CAUSAL.value)
  # The twin has other parameters, which the selectors may not match.
  counted["frozen"] = count_frozen(config).get("total", 0)
  twin = count(plan_parameters.dense_twin(config), causal=_CAUSAL.value)
  if _JSON.value:
    print(json.dumps(counted | {"dense_twin": twin}, indent=2))
    return
  console = Console()
  console = console if console.is_terminal else Console(width=_TABLE_WIDTH)
  console.print(make_table(counted, twin))
  ours, theirs = feed_forward_flops(counted), feed_forward_flops(twin)
  verdict = "equal" if ours == theirs else f"ratio {ours / theirs:.4f}"
  router = counted["parts"]["router"]["flops_per_token"]
  console.print(
    f"Feed-forward FLOPs/token, router aside: {ours:,.0f}, dense twin {theirs:,.0f}: "
    f"{verdict}. The router adds {router / counted['flops_per_token']:.2%} of the total."
  )
  pairs = "causal pairs only" if _CAUSAL.value else "the full square, as in PaLM"
  if frozen := counted["frozen"]:
    console.print(
      f"{frozen:,} parameters are frozen: the optimizer keeps moments only for the other "
      f"{counted['total'] - frozen:,}. FLOPs are counted as if all were trained."
    )
  console.print(
    f"Training (3x forward), sequence {counted['sequence_length']}, vocabulary "
    f"{counted['vocab_size']}; attention: {pairs}; the embedding's lookup is not "
    "counted, the output head is. Decoding keeps "
    f"{counted['cache_numbers_per_token']:,} numbers per token in its cache."
  )


def run() -> None:
  """Runs the program."""
  cli.define_config(workdir=False)
  cli.run(main)


if __name__ == "__main__":
  run()
