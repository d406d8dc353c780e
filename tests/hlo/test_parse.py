"""Reading collectives out of optimised programs: by hand, and of the real step."""

import jax
import pytest

from moejax.config import Config, MeshConfig, ModelConfig, MoEConfig
from moejax.config.mesh import AXES
from moejax.hlo import groups as hlo_groups
from moejax.hlo import intended, traffic
from moejax.hlo import parse as hlo
from moejax.models.decoder import Decoder
from moejax.models.loss import Batch
from moejax.models.placement import param_shardings
from moejax.sharding import rules
from moejax.sharding.mesh import BY_HAND, NEWTON_SCHULZ, make_mesh
from moejax.train import step as step_lib

# ruff: noqa: E501
PROGRAM = """HloModule jit_step, is_scheduled=true

FileNames
1 "/somewhere/lib/jax/core.py"
2 "/somewhere/moejax/layers/moe.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=2 end_column=9}
2 {file_name_id=2 function_name_id=1 line=42 end_line=42 column=2 end_column=9}

StackFrames
1 {file_location_id=2 parent_frame_id=0}
2 {file_location_id=1 parent_frame_id=1}


%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  %x = bf16[4,8]{1,0} get-tuple-element(%p), index=1
  %sent = (bf16[2,8]{1,0}, bf16[2,8]{1,0}) all-to-all(%x, %x), replica_groups={{0,1},{2,3},{4,5},{6,7}}, metadata={op_name="jit(step)/all_to_all" stack_frame_id=2}
  ROOT %t = (s32[], bf16[4,8]{1,0}) tuple(%x, %x)
}

%inner_condition (p: (s32[], bf16[4,8])) -> pred[] {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %bound = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%outer_body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  ROOT %w = (s32[], bf16[4,8]{1,0}) while(%p), condition=%inner_condition, body=%inner_body
}

%all-reduce-scatter.1 (p: f32[16]) -> f32[4] {
  %p = f32[16]{0} parameter(0)
  %ar = f32[16]{0} all-reduce(%p), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  ROOT %cut = f32[4]{0} dynamic-slice(%ar), dynamic_slice_sizes={4}
}

ENTRY %main (x: bf16[4,8], y: f32[16]) -> f32[4] {
  %x = bf16[4,8]{1,0} parameter(0)
  %y = f32[16]{0} parameter(1)
  %w = (s32[], bf16[4,8]{1,0}) while(%x), condition=%c, body=%outer_body, backend_config={"known_trip_count":{"n":"5"}}
  %gs = (f32[2]{0}, f32[16]{0}) all-gather-start(%y), replica_groups=[1,8]<=[8], dimensions={0}
  %gd = f32[16]{0} all-gather-done(%gs)
  %p = f32[16]{0} collective-permute(%y), source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}
  ROOT %f = f32[4]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


COMBINED = """
ENTRY %main (x: bf16[16,4], y: bf16[8]) -> bf16[8,4] {
  %x = bf16[16,4]{1,0} parameter(0)
  %y = bf16[8]{0} parameter(1)
  %rs = ((bf16[16,4]{1,0}, bf16[8]{0}), (bf16[8,4]{1,0}, bf16[4]{0})) reduce-scatter-start(%x, %y), replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%add
  %rd = (bf16[8,4]{1,0}, bf16[4]{0}) reduce-scatter-done(%rs)
  %ag = ((bf16[8,4]{1,0}, bf16[4]{0}), (bf16[16,4]{1,0}, bf16[8]{0})) all-gather-start(%x, %y), replica_groups=[4,2]<=[8], dimensions={0}
  %ar = (bf16[16,4]{1,0}, bf16[8]{0}) all-reduce-start(%x, %y), replica_groups=[4,2]<=[8], to_apply=%add
}
"""


def test_buffers_sent_as_one_all_count():
  """What a compiler combines into one start is the sum of its buffers: 64 and 8 numbers
  of 2 bytes, of which a device of two sends half, and twice that to reduce."""
  found = hlo.Program(COMBINED).collectives(("data", "expert"), (4, 2))
  assert {c.kind: (c.bytes, c.wire_bytes) for c in found} == {
    "reduce-scatter": (144, 72),
    "all-gather": (144, 72),
    "all-reduce": (144, 144),
  }


def test_a_program_by_hand():
  """Loops multiply; starts count and dones do not; a fused reduce-scatter is one."""
  found = hlo.Program(PROGRAM).collectives(("data", "expert"), (4, 2))
  rows = {c.kind: (c.axis, c.count, c.bytes, c.wire_bytes, c.source) for c in found}
  assert len(found) == 4
  # 5 turns of the outer loop, 3 of the inner one; two buffers of 2*8 numbers of 2 bytes.
  line = "moejax/layers/moe.py:42"
  assert rows["all-to-all"] == ("expert", 15, 64, 32, line)
  assert rows["all-gather"] == ("data,expert", 1, 64, 56, "")
  assert rows["collective-permute"][:4] == ("expert", 1, 64, 64)
  assert rows["reduce-scatter"][:3] == ("data", 1, 16 * 4)


@pytest.mark.parametrize("turns", [4, 5])
def test_stacks_in_the_hosts_memory_do_not_count(turns):
  """Of two stacks of five repeats, 5*4*8 numbers of 2 bytes each, one is offloaded; the
  first or last repeat may be outside the loop."""
  stacks = "bf16[5,4,8]{2,1,0}, bf16[5,4,8]{2,1,0:T(8,128)(2,1)S(5)}"
  text = f"""HloModule jit_step

ENTRY %main (p: s32[]) -> s32[] {{
  %p = s32[] parameter(0)
  %w = (s32[], {stacks}) while(%p), backend_config={{"known_trip_count":{{"n":"{turns}"}}}}
  ROOT %r = s32[] get-tuple-element(%w), index=0
}}
"""
  assert hlo.Program(text).stacked_bytes(set()) == 5 * 4 * 8 * 2


@pytest.mark.parametrize(
  ("spelling", "groups"),
  [
    ("mesh['a'=2,'b'=4] {'b'}", [(0, 1, 2, 3), (4, 5, 6, 7)]),
    ("mesh['a'=2,'b'=4] {'a'}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
    ("mesh['a'=8] {'a':(1)2}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
    ("mesh['a'=8] {'a':(4)2}", [(0, 1), (2, 3), (4, 5), (6, 7)]),
    (
      "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}",
      [(0, 4), (1, 5), (2, 6), (3, 7)],
    ),
    ("[4,2]<=[8]", [(0, 1), (2, 3), (4, 5), (6, 7)]),
    ("[4,2]<=[2,4]T(1,0)", [(0, 4), (1, 5), (2, 6), (3, 7)]),
    ("{{0,2},{1,3}}", [(0, 2), (1, 3)]),
  ],
)
def test_every_spelling_of_device_groups(spelling, groups):
  """Lists, iota tiles, and axes of a mesh, whole or in part."""
  assert (
    hlo_groups.groups_of(f"%x), replica_groups={spelling}, dimensions={{0}}") == groups
  )


B, S, D, E, LAYERS = 8, 16, 16, 8, 2


def compiled_step(exchange: str, remat: str, mesh_config: MeshConfig):
  """Collectives of the gradients of a decoder whose layers are scanned, all MoE."""
  moe = MoEConfig(
    num_experts=E,
    num_selected=2,
    hidden=16,
    router="top_k",
    every=1,
    offset=0,
    exchange=exchange,
  )
  sizes = ModelConfig(num_layers=LAYERS, width=D, num_heads=4, hidden=16, remat=remat)
  model, mesh = Decoder(sizes, moe, vocab_size=32), make_mesh(mesh_config, jax.devices())

  def gradients(params, batch):
    return step_lib.loss_gradients(model, params, batch, jax.random.key(0))

  with jax.set_mesh(mesh):
    placed = param_shardings(model, mesh)
    params = jax.tree.map(
      lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at),
      model.shapes(),
      placed,
    )
    at = rules.batch_sharding(mesh)
    tokens = jax.ShapeDtypeStruct((B, S), "int32", sharding=at)
    lowered = jax.jit(gradients).lower(
      params, dict.fromkeys(Batch.__annotations__, tokens)
    )
    text = lowered.compile().as_text()
  assert text
  return hlo.Program(text).collectives(AXES, mesh.devices.shape), Config(moe=moe)


@pytest.mark.parametrize(
  ("remat", "per_layer"),
  [
    ("full", 4),
    pytest.param("offload", 4, marks=pytest.mark.slow),
    pytest.param("none", 4, marks=pytest.mark.slow),
    pytest.param("all", 5, marks=pytest.mark.slow),
  ],
)
def test_two_exchanges_a_layer_each_way(remat, per_layer):
  """Out and back, forward and backward; recomputation sends out again only if asked to,
  and never back.

  Each moves G*E*C*D numbers of 4 bytes over all devices: C = ceil(1.25 * 2 * 16 / 8).
  Gates, one number for D, travel with tokens, and their gradient back.
  """
  found, config = compiled_step("all_to_all", remat, MeshConfig(data=2, expert=4))
  exchanges = [c for c in found if c.kind == "all-to-all"]
  assert {c.axis for c in exchanges} == {"expert"}
  gates = B * E * 5 * 4 // 8
  counts = {gates: 0, gates * D: 0}
  for exchange in exchanges:
    counts[exchange.bytes] += exchange.count
  assert counts[gates * D] == per_layer * LAYERS
  assert counts[gates] == (0 if remat == "none" else per_layer - 2) * LAYERS
  # Also what the transpose sends, and what is sent again for recomputation.
  assert all(BY_HAND in c.operation for c in exchanges)
  # No expert weights over the expert axis, and nothing that nobody asked for.
  assert not [c for c in found if c.kind == "all-gather" and "expert" in c.axis]
  assert not [c for c in found if not intended.reason(c, config)]


def test_a_weight_gathered_over_the_expert_axis_is_not_intended():
  """What a missing axis in a sharding rule would send."""
  stray = hlo.Collective(
    kind="all-gather",
    axis="expert",
    count=1,
    bytes=1 << 20,
    wire_bytes=1 << 19,
    source="moejax/layers/moe.py:60",
    operation="",
  )
  config = Config(moe=MoEConfig(exchange="all_to_all"))
  assert not intended.reason(stray, config)


def test_only_a_cpu_is_excused_from_scattering_gradients():
  """It has no such pass; and what moejax scatters by hand no compiler is excused from."""

  def reason(platform: str, operation: str) -> str:
    found = hlo.Collective(
      kind="all-reduce",
      axis="fsdp",
      count=1,
      bytes=1 << 20,
      wire_bytes=1 << 20,
      source="moejax/layers/feed_forward.py:34",
      operation=operation,
    )
    return intended.reason(found, Config(), platform)

  dense = "jit(step)/transpose(jvp())/dot_general"
  assert "CPU" in reason("cpu", dense)
  assert not reason("tpu", dense) and not reason("gpu", dense) and not reason("", dense)
  assert not reason("cpu", f"jit(step)/transpose(jvp({BY_HAND}))/psum")


def test_a_sum_keeps_the_purpose_of_its_parts():
  """Rows of one line and size are merged by purpose. What moejax gathers by hand over the
  expert axis under ring is intended; the same gather by the compiler is not."""
  config = Config()
  config.moe.exchange = "ring"
  config.moe.num_experts, config.model.width, config.moe.hidden = 4, 2, 2

  def gather(name: str, operation: str) -> str:
    return (
      f"  %{name} = f32[512]{{0}} all-gather(%x), replica_groups={{{{0,1}}}},"
      f' dimensions={{0}}, metadata={{op_name="{operation}"}}\n'
    )

  text = (
    "HloModule step\nENTRY %main (x: f32[256]) -> f32[512] {\n"
    "  %x = f32[256]{0} parameter(0)\n"
    + gather("a", f"jit(step)/{BY_HAND}/gather")
    + gather("b", f"jit(step)/{BY_HAND}/other")
    + gather("c", "jit(step)/dot")
    + "}\n"
  )
  rows = traffic.rows_of(config, text, tuple(2 if a == "expert" else 1 for a in AXES))
  assert sorted((row["count"], bool(row["purpose"])) for row in rows) == [
    (1, False),
    (2, True),
  ]


def test_only_muon_gathers_matrices_over_tensor():
  """By hand, for its Newton-Schulz iterations; any other such gather is a mistake."""

  def reason(optimizer: str, operation: str) -> str:
    config = Config()
    config.optimizer.name = optimizer
    found = hlo.Collective(
      kind="all-gather",
      axis="tensor",
      count=1,
      bytes=1 << 20,
      wire_bytes=1 << 19,
      source="moejax/train/muon.py:1",
      operation=operation,
    )
    return intended.reason(found, config)

  muon = f"jit(step)/{NEWTON_SCHULZ}/{BY_HAND}/all_gather"
  assert "Newton" in reason("muon", muon)
  assert not reason("adamw", muon)
  assert not reason("muon", f"jit(step)/{BY_HAND}/all_gather")
