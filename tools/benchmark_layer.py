"""The MoE layer, router included, against one dense feed-forward of equal active FLOPs.

  python -m tools.benchmark_layer --shapes=A,B,C,D --cores=1 --json=FILE

Each row compares one variant with the dense layer of hidden width K*F: medians of
interleaved runs in one process. `forward` is the output and the router's
statistics; `both` adds the gradients of every parameter and of the input. Besides
the shapes: `--growth` (E from 8 to 512), `--skew` (half of all tokens to one
expert, against the balanced layer) and `--routers` (the router alone, forward).
"""

import argparse
import functools
import json
import sys
from typing import Any

from moejax.cli import arguments
from moejax.cli import flags as cli
from moejax.device_check.shapes import FACTOR, Shape
from moejax.run import timing

SHAPES = {
  shape.name: shape
  for shape in (
    Shape("A", T=4096, D=256, F=1024, E=8, K=2),
    Shape("B", T=4096, D=256, F=1024, E=64, K=1),
    Shape("C", T=4096, D=512, F=512, E=32, K=4),
    Shape("D", T=2048, D=256, F=256, E=128, K=8),
  )
}
GROWTH = tuple(
  Shape(f"E={e}", T=4096, D=256, F=256, E=e, K=4) for e in (8, 16, 32, 64, 128, 256, 512)
)
# What each variant is: dispatcher, capacity factor.
VARIANTS: dict[str, tuple[str, float | None]] = {
  "dropless": ("auto", None),
  "capacity": ("auto", FACTOR),
  "gather": ("gather", FACTOR),
  "einsum": ("einsum", FACTOR),
}


def parse(argv: list[str]) -> argparse.Namespace:
  parser = cli.Parser(__doc__)
  parser.add_argument(
    "--shapes", default="A,B,C,D", help="shapes to measure, of A,B,C,D; empty: none"
  )
  parser.add_argument("--variants", default="dropless,capacity,gather,einsum")
  parser.add_argument(
    "--cores", type=arguments.at_least(0), default=1, help="cores to use; 0: all"
  )
  parser.add_argument(
    "--seconds", type=arguments.at_least(0.0), default=10.0, help="seconds per shape"
  )
  parser.add_argument("--dtype", default="auto", help="float32; auto: bfloat16 on a GPU")
  parser.add_argument("--activation", default="gelu", help="relu, gelu or swiglu")
  parser.add_argument(
    "--growth", action="store_true", help="also measure E from 8 to 512"
  )
  parser.add_argument(
    "--skew", action="store_true", help="also send half of the tokens to one expert"
  )
  parser.add_argument(
    "--routers", action="store_true", help="also measure each router alone"
  )
  parser.add_argument(
    "--all", action="store_true", help="same as --growth --skew --routers"
  )
  parser.add_argument("--json", default="", help="write the rows to this file")
  args = parser.parse_args(argv)
  arguments.split_names(parser, args, shapes=SHAPES, variants=VARIANTS)
  return args


def main(argv: list[str] | None = None) -> None:
  args = parse(sys.argv[1:] if argv is None else argv)
  cores = timing.prepare(args.cores)
  # Only now: XLA sizes its thread pool by the cores the process may use.
  from moejax.device_check import layer_variants as layers

  settings = layers.Settings.make(args.dtype, args.activation)
  print(f"# {settings.device}, {settings.dtype}, {args.activation}, {cores} core(s)")
  rows: list[dict[str, Any]] = []
  measure = functools.partial(
    layers.measure, settings=settings, seconds=args.seconds, cores=cores, show=show
  )
  for name in args.shapes:
    variants = {v: VARIANTS[v] for v in args.variants}
    rows += measure(SHAPES[name], variants, skew=args.skew or args.all)
  if args.growth or args.all:
    for shape in GROWTH:
      rows += measure(shape, {"dropless": VARIANTS["dropless"]}, skew=False)
  if args.routers or args.all:
    for name in args.shapes:
      rows += layers.measure_routers(SHAPES[name], settings, args.seconds, cores, show)
  if args.json:
    with open(args.json, "w", encoding="utf-8") as file:
      json.dump(rows, file, indent=1)


_header_shown = False


def show(row: dict[str, Any]) -> None:
  """Prints one row as soon as it is measured."""
  global _header_shown
  if not _header_shown:
    _header_shown = True
    print(
      f"{'shape':8}{'variant':23}{'direction':10}{'ratio':>7}{'q1':>7}{'q3':>7}"
      f"{'minima':>8}{'ms':>9}{'temp':>7}  against"
    )
  temp = row["temp_bytes_ratio"]
  print(
    f"{row['shape']:8}{row['variant']:23}{row['direction']:10}{row['ratio']:7.2f}"
    f"{row['q1']:7.2f}{row['q3']:7.2f}{row['ratio_of_minima']:8.2f}"
    f"{row['milliseconds']:9.1f}{'' if temp is None else format(temp, '.2f'):>7}"
    f"  {row['against']}",
    flush=True,
  )


if __name__ == "__main__":
  main()
