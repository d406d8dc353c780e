"""What compilers said about train steps, per device: goldens of the planner.

Each line is the output of

  python -m tools.compile_for --config=PRESET --topology=TOPOLOGY [--slices=SLICES] \\
      --config.mesh.AXIS=SIZE ... --config.FIELD=VALUE ...

with jax 0.10.2 and libtpu 0.0.42.1, or the GPU compiler of the same jax. The first
eleven are also in the table of docs/scale.md.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moejax.config.mesh import AXES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """A compiled train step."""

  name: str
  preset: str
  topology: str
  sizes: tuple[int, ...]
  """Of the mesh's axes."""
  slices: int = 1
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  memory: float
  """Arguments and temporaries in GB."""
  flops: float
  """Executed over the model's."""
  wire: float
  """GB sent."""
  flops_error: float = 0.02
  """Relative error that the prediction is known to have, here and of what is sent."""
  wire_error: float = 0.02

  @property
  def mesh(self) -> dict[str, int]:
    return dict(zip(AXES, self.sizes, strict=True))


_SMALL = {"model.num_layers": 8, "train.batch_size": 32}

PROGRAMS = (
  Program(
    name="mixtral",
    preset="mixtral_8x7b",
    topology="v5p:4x4x8",
    sizes=(1, 16, 8, 1),
    memory=31.1,
    flops=1.265,
    wire=118.8,
  ),
  Program(
    name="mixtral-full",
    preset="mixtral_8x7b",
    topology="v5p:4x4x8",
    sizes=(1, 16, 8, 1),
    overrides={"model.remat": "full"},
    memory=61.9,
    flops=1.265,
    wire=103.7,
  ),
  Program(
    name="mixtral-capacity",
    preset="mixtral_8x7b",
    topology="v5p:4x4x8",
    sizes=(1, 16, 8, 1),
    overrides={"moe.capacity_factor": 1.25},
    memory=30.7,
    flops=1.525,
    wire=137.4,
  ),
  Program(
    name="mixtral-two-slices",
    preset="mixtral_8x7b",
    topology="v5p:4x4x4",
    slices=2,
    sizes=(2, 8, 8, 1),
    memory=48.3,
    flops=1.265,
    wire=117.8,
  ),
  Program(
    name="switch-c",
    preset="switch_c_decoder",
    topology="v5p:8x8x16",
    sizes=(1, 8, 128, 1),
    memory=37.5,
    flops=1.440,
    wire=75.3,
  ),
  Program(
    name="deepseek-v3",
    preset="deepseek_v3",
    topology="v5p:8x8x8",
    sizes=(1, 8, 64, 1),
    memory=97.9,
    flops=1.358,
    wire=342.6,
  ),
  # Needs more than there is, so the compiler recomputes some products once more.
  Program(
    name="deepseek-v3-two",
    preset="deepseek_v3",
    topology="v5p:8x8x8",
    sizes=(1, 8, 64, 1),
    overrides={"train.batch_size": 1024, "moe.exchange_chunks": 8},
    memory=104.4,
    flops=1.404,
    wire=494.6,
    flops_error=0.04,
  ),
  Program(
    name="gpt4-class",
    preset="gpt4_class_1_8t",
    topology="v5p:8x8x16",
    sizes=(1, 64, 16, 1),
    memory=96.7,
    flops=1.215,
    wire=1429.9,
  ),
  # Needs more than there is; the compiler accepts it, for not all is live at once.
  Program(
    name="gpt4-class-two",
    preset="gpt4_class_1_8t",
    topology="v5p:8x8x16",
    sizes=(1, 64, 16, 1),
    overrides={"train.batch_size": 2048},
    memory=120.8,
    flops=1.215,
    wire=1529.6,
  ),
  Program(
    name="gpu-capacity",
    preset="mixtral_8x7b",
    topology="h100:4x8",
    sizes=(1, 4, 8, 1),
    overrides=_SMALL | {"moe.capacity_factor": 1.25},
    memory=11.04,
    flops=1.546,
    wire=12.61,
  ),
  Program(
    name="gpu-dropless",
    preset="mixtral_8x7b",
    topology="h100:4x8",
    sizes=(1, 4, 8, 1),
    overrides=_SMALL,
    memory=11.58,
    flops=1.546,
    wire=12.03,
  ),
  Program(
    name="gpu-olmoe-capacity",
    preset="olmoe_1b_7b",
    topology="h100:2x8",
    sizes=(1, 2, 8, 1),
    overrides={"train.batch_size": 32, "moe.capacity_factor": 1.25},
    memory=16.62,
    flops=1.5968,
    wire=28.37,
  ),
  Program(
    name="gpu-olmoe-ring",
    preset="olmoe_1b_7b",
    topology="h100:1x8",
    sizes=(1, 1, 8, 1),
    overrides={"train.batch_size": 8},
    memory=57.61,
    flops=48.6320,
    wire=11.55,
  ),
  Program(
    name="gpu-deepseek-v2-lite",
    preset="deepseek_v2_lite",
    topology="h200:2x8",
    sizes=(1, 2, 8, 1),
    overrides={"train.batch_size": 32, "moe.exchange_buffer": 2.0},
    memory=47.88,
    flops=10.4177,
    wire=35.06,
  ),
  Program(
    name="olmoe-ring",
    preset="olmoe_1b_7b",
    topology="v5p:2x2x4",
    sizes=(1, 2, 8, 1),
    overrides={"train.batch_size": 32, "moe.exchange_buffer": 1.5},
    memory=24.82,
    flops=1.3135,
    wire=24.10,
  ),
  Program(
    name="gpu-olmoe-no-remat",
    preset="olmoe_1b_7b",
    topology="h100:2x8",
    sizes=(1, 2, 8, 1),
    overrides={
      "train.batch_size": 16,
      "moe.capacity_factor": 1.25,
      "model.remat": "none",
    },
    memory=35.43,
    flops=1.2896,
    wire=13.46,
  ),
  Program(
    name="gpu-olmoe-dots-accumulation",
    preset="olmoe_1b_7b",
    topology="h100:2x8",
    sizes=(1, 4, 4, 1),
    overrides={
      "train.batch_size": 32,
      "train.accumulation": 2,
      "moe.capacity_factor": 1.25,
      "model.remat": "dots",
    },
    memory=15.67,
    flops=1.5281,
    wire=39.59,
  ),
  Program(
    name="gpu-olmoe-tensor",
    preset="olmoe_1b_7b",
    topology="h100:2x8",
    sizes=(2, 2, 2, 2),
    overrides={
      "train.batch_size": 16,
      "moe.capacity_factor": 1.25,
      "model.remat": "full",
    },
    memory=30.90,
    flops=1.5989,
    wire=21.11,
  ),
  Program(
    name="olmoe-capacity",
    preset="olmoe_1b_7b",
    topology="v5p:2x2x4",
    sizes=(1, 2, 8, 1),
    overrides={"train.batch_size": 32, "moe.capacity_factor": 1.25},
    memory=15.87,
    flops=1.5009,
    wire=28.54,
  ),
  Program(
    name="gpu-deepseek-v2-lite-capacity",
    preset="deepseek_v2_lite",
    topology="h200:2x8",
    sizes=(1, 16, 1, 1),
    overrides={"train.batch_size": 16, "moe.capacity_factor": 1.25},
    memory=26.83,
    flops=1.5893,
    wire=88.37,
  ),
  Program(
    name="gpu-qwen3-capacity",
    preset="qwen3_30b_a3b",
    topology="h200:4x8",
    sizes=(1, 4, 8, 1),
    overrides={"train.batch_size": 32, "moe.capacity_factor": 1.25},
    memory=29.13,
    flops=1.7468,
    wire=60.18,
  ),
  Program(
    name="mixtral-offload",
    preset="mixtral_8x7b",
    topology="v5p:4x4x8",
    sizes=(1, 16, 8, 1),
    overrides={"model.remat": "offload", "moe.expert_chunks": 4},
    memory=42.6,
    flops=1.265,
    wire=103.7,
  ),
  Program(
    name="mixtral-capacity-offload",
    preset="mixtral_8x7b",
    topology="v5p:4x4x8",
    sizes=(1, 16, 8, 1),
    overrides={"moe.capacity_factor": 1.25, "model.remat": "offload"},
    memory=42.3,
    flops=1.525,
    wire=118.6,
  ),
)
