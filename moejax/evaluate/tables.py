"""Prints an evaluation's results as tables on the terminal."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from moejax.run.results import coverage

MAX_DOMAINS = 20
"""Maximum rows of the printed domain table; the file has all domains."""

_WIDTH = 100


def make_console() -> Console:
  """Returns the terminal, or a console of 100 columns if output is redirected."""
  console = Console()
  return console if console.is_terminal else Console(width=_WIDTH)


def print_evaluation(console: Console, evaluation: dict[str, Any]) -> None:
  """Prints losses and routing per capacity factor, loads per layer, domain losses."""
  console.print(_summary(evaluation))
  if any("layers" in result for result in evaluation["results"]):
    console.print(_loads(evaluation))
  if len(evaluation["results"][0]["domains"]) > 1:
    console.print(_domains(evaluation))


def _name(result: dict[str, Any]) -> str:
  factor = result["eval_capacity_factor"]
  return factor if isinstance(factor, str) else f"{factor:g}"


def _summary(evaluation: dict[str, Any]) -> Table:
  title = (
    f"{evaluation['split']}, step {evaluation.get('step', '?')}: "
    f"{coverage(evaluation['tokens'], evaluation['split_tokens'])}, "
    f"{evaluation['bytes']:,} bytes"
  )
  table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
  for header in (
    "eval capacity",
    "loss (nats/token)",
    "bits/byte",
    "perplexity",
    "dropped",
    "max load",
    "dead experts",
  ):
    table.add_column(header, justify="right")
  for result in evaluation["results"]:
    layers = result.get("layers", [])
    bits = result["bits_per_byte"]
    table.add_row(
      _name(result),
      f"{result['loss']:.4f}",
      "-" if bits is None else f"{bits:.4f}",
      f"{result['perplexity']:.4g}",
      f"{result['dropped_fraction']:.2%}" if layers else "-",
      f"{max(layer['max_load_ratio'] for layer in layers):.2f}x" if layers else "-",
      f"{sum(layer['dead_experts'] for layer in layers):.0f}" if layers else "-",
    )
  return table


def _loads(evaluation: dict[str, Any]) -> Table:
  """Returns a table of drops and expert load spread, per capacity factor and layer."""
  title = "Load per expert: its share of the layer's computed assignments"
  table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
  headers = ("eval capacity", "layer", "dropped", "least", "most", "even")
  for header in (*headers, "token entropy"):
    table.add_column(header, justify="right")
  for result in evaluation["results"]:
    for layer in result.get("layers", []):
      load = layer["load"]
      table.add_row(
        _name(result),
        str(layer["layer"]),
        f"{layer['drop_fraction']:.2%}",
        f"{min(load):.2%}",
        f"{max(load):.2%}",
        f"{1 / len(load):.2%}",
        f"{layer['entropy_fraction']:.0%} of max",
      )
  return table


def _domains(evaluation: dict[str, Any]) -> Table:
  """Returns a table of the largest domains' losses, with a column per capacity factor."""
  results = evaluation["results"]
  domains = results[0]["domains"]
  largest = sorted(domains, key=lambda name: -domains[name]["tokens"])[:MAX_DOMAINS]
  title = "Loss per domain (nats/token)"
  if len(domains) > len(largest):
    title += f", the largest {len(largest)} of {len(domains)}"
  table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
  table.add_column("domain")
  table.add_column("tokens", justify="right")
  for result in results:
    table.add_column(_name(result), justify="right")
  for name in largest:
    losses = (f"{result['domains'][name]['loss']:.4f}" for result in results)
    table.add_row(name, f"{domains[name]['tokens']:,}", *losses)
  return table
