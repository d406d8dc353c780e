"""Predicted FLOPs, traffic and memory: by hand on a small model, and against programs
that a compiler made."""

from typing import Any

import pytest

from moejax.config import Config, MeshConfig, ModelConfig, MoEConfig
from moejax.cost.chips import CHIPS
from moejax.plan.predict import flops, links, memory, wire
from moejax.plan.predict.load import load_of
from moejax.plan.predict.weights import Shares, weights_of
from moejax.plan.topology import parse
from tools.benchmark_plan import config_of, predict
from tools.compiled_programs import PROGRAMS


def tiny(remat: str = "all", **moe: Any) -> Config:
  """Two layers of D 32, four experts of F 64, top-1; 8 devices as fsdp 2 x expert 4."""
  config = Config(
    model=ModelConfig(
      num_layers=2,
      width=32,
      num_heads=2,
      hidden=64,
      vocab_size=64,
      remat=remat,
      tie_embeddings=False,
    ),
    moe=MoEConfig(
      **{"num_experts": 4, "hidden": 64, "every": 1, "offset": 0, "capacity_factor": 1.0}
      | moe
    ),
    mesh=MeshConfig(data=1, fsdp=2, expert=4),
  )
  config.data.sequence_length, config.train.batch_size = 32, 8
  return config


MESH = {"data": 1, "fsdp": 2, "expert": 4, "tensor": 1}


@pytest.fixture(scope="module")
def weights():
  return weights_of(tiny())


def shares_on(weights, **mesh) -> Shares:
  return Shares(weights, MESH | mesh, "adamw")


def test_parameters_and_moments_by_hand(weights):
  """Experts are cut over fsdp and expert, other matrices over fsdp, vectors not."""
  experts = 2 * 4 * 2 * 32 * 64 // 8
  attention = 2 * 4 * 32 * 32 // 2
  router = 2 * 32 * 4 // 2
  vocabulary = 2 * 64 * 32 // 2
  norms = (2 * 2 + 1) * 32
  numbers = experts + attention + router + vocabulary + norms
  shares = shares_on(weights)
  assert shares.parameters == 4 * numbers
  assert shares.moments == 8 * numbers
  assert shares.gradients == 4 * numbers


def test_flops_by_hand():
  """Recomputation adds a fourth forward product, but for the last of the experts, whose
  gates travel; the full square of scores without a kernel."""
  tokens = 32
  attention = 2 * 4 * 32 * 32 * 2 * tokens
  scores = 2 * 2 * 32 * 32 * 2 * tokens
  router = 2 * 32 * 4 * 2 * tokens
  head = 2 * 32 * 64 * tokens
  expert = 2 * 32 * 64 * 2 * tokens
  for remat, passes, products in (("none", 3, 6), ("all", 4, 7), ("full", 4, 7)):
    config = tiny(remat)
    found = flops.executed_flops(config, load_of(config, MESH, "cpu"))
    assert found["attention"] == passes * attention
    assert found["attention_scores"] == passes * scores
    assert found["router"] == passes * router
    assert found["head"] == 3 * head
    # As many slots as tokens: C = 32 / 4 at each of four experts.
    assert found["experts"] == products * expert
    assert found["total"] == pytest.approx(sum(found.values()) / 2)


def test_rows_by_hand():
  """Slots count as many as there are, sorted rows as many as are chosen; dropless slots
  have room for every token at every expert."""
  sparse: dict[str, Any] = {"capacity_factor": None}
  assert load_of(tiny(capacity_factor=2.0), MESH, "tpu").rows == 64
  assert load_of(tiny(**sparse), MESH, "tpu").rows == 32
  ring = load_of(tiny(**sparse, exchange="ring", dispatcher="gather"), MESH, "tpu")
  assert ring.rows == 4 * 32
  bounded = load_of(tiny(**sparse, exchange_buffer=1.5), MESH, "tpu")
  assert (bounded.exchange, bounded.buffer) == ("ragged", 48)
  parts = tiny(**sparse, exchange_chunks=2, group_size=16)
  assert load_of(parts, MESH, "tpu").buffer == 4 * 16


def test_exchange_by_hand():
  """Slots of 32 tokens, three quarters of which leave the device, five times a layer when
  what arrived is sent again, four when it is kept, with as many gates but for outputs and
  their gradients; six times without gates. Sorted rows go five times."""
  one = 2 * 32 * 32 * 4 * 3 // 4
  gates = one // 32

  def tokens(config: Config) -> float:
    rows = wire.sent(config, load_of(config, MESH, "tpu"), shares_on(weights_of(config)))
    return sum(row.bytes for row in rows if row.kind == "all-to-all")

  assert tokens(tiny("all")) == 5 * one + 3 * gates
  assert tokens(tiny("full")) == tokens(tiny("offload")) == 4 * one + 2 * gates
  assert tokens(tiny("all", dispatcher="einsum")) == 6 * one
  assert tokens(tiny("all", capacity_factor=None)) == 5 * one


def test_weights_sent_by_hand(weights):
  """Experts' matrices travel over fsdp for both passes, half of each from the other
  device; their gradients once, and none of them over `expert`, which cuts them."""
  config = tiny()
  shares = shares_on(weights)
  only = Shares(tuple(w for w in weights if w.part == "experts"), MESH, "adamw")
  rows = wire.sent(config, load_of(config, MESH, "gpu"), only)
  whole = 2 * 2 * 32 * 64 * 4 / 2
  sent = {(r.kind, r.axis): r.bytes for r in rows if r.purpose != "tokens"}
  assert sent == {
    ("all-gather", "fsdp"): 2 * whole,
    ("reduce-scatter", "fsdp"): whole,
  }
  rows = wire.sent(config, load_of(config, MESH, "gpu"), shares)
  assert {r.axis for r in rows if r.kind == "all-reduce"} == {"expert", "fsdp,expert"}


def test_more_fsdp_never_needs_more_parameters(weights):
  """Nor moments, nor gradients, whatever axis the devices are taken from."""
  for axis in ("data", "expert"):
    needs = [
      shares_on(weights, **{"data": 4, "expert": 4, "fsdp": n} | {axis: 4 // n})
      for n in (1, 2, 4)
    ]
    for what in ("parameters", "moments", "gradients"):
      sizes = [getattr(shares, what) for shares in needs]
      assert sizes == sorted(sizes, reverse=True)


def test_recomputing_more_never_keeps_more(weights):
  config, kept = tiny(), []
  for remat in ("all", "full", "dots", "none"):
    config.model.remat = remat
    load = load_of(config, MESH, "tpu")
    kept.append(memory.kept_activations(config, load, shares_on(weights)))
  assert kept[0] < kept[1] < kept[3] and kept[0] < kept[2] < kept[3]


def test_links_of_a_torus():
  """From the last axis on, axes take whole sides, as many as make up their size."""
  spans = links.spans(
    parse("v5p:4x4x8"), {"data": 1, "fsdp": 16, "expert": 8, "tensor": 1}, "data"
  )
  assert spans["expert"].sides == (8,) and spans["fsdp"].sides == (4, 4)
  slices = links.spans(
    parse("v5p:4x4x4", 2), {"data": 2, "fsdp": 8, "expert": 8, "tensor": 1}, "data"
  )
  assert (slices["data"].inside, slices["data"].devices) == (1, 2)


def test_time_over_links():
  """Eight GPUs of a node use NVLink; over two nodes, half of an exchange leaves."""
  chip = CHIPS["h100"]
  mesh = {"data": 1, "fsdp": 1, "expert": 16, "tensor": 1}
  spans = links.spans(parse("h100:2x8"), mesh, "data")
  found = links.seconds(1e9, spans["expert"], chip, exchange=True)
  assert found == ("dcn", 0.5e9 / chip.slow_bandwidth)
  inside = links.spans(parse("h100:1x8"), mesh | {"expert": 8}, "data")
  found = links.seconds(1e9, inside["expert"], chip, exchange=True)
  assert found == ("nvlink", 1e9 / chip.link_bandwidth)


@pytest.fixture(scope="module")
def predictions():
  """What is predicted of each compiled program: memory, FLOPs over the model's, wire."""
  known, found = {}, {}
  for program in PROGRAMS:
    model = program.preset, program.overrides.get("model.num_layers")
    if model not in known:
      known[model] = weights_of(config_of(program))
    found[program.name] = predict(program, known[model])
  return found


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_against_compiled(predictions, program):
  """Each compiled program: memory within a quarter, FLOPs and wire within 2%, but where
  the program's own line says how far it is off, and why."""
  found = predictions[program.name]
  assert found["memory"] == pytest.approx(program.memory, rel=0.25)
  assert found["flops"] == pytest.approx(program.flops, rel=program.flops_error)
  assert found["wire"] == pytest.approx(program.wire, rel=program.wire_error)


def test_memory_in_the_middle(predictions):
  """Half of the programs are predicted to within a tenth."""
  errors = sorted(abs(predictions[p.name]["memory"] / p.memory - 1) for p in PROGRAMS)
  assert errors[len(errors) // 2] <= 0.1


def test_what_does_not_fit_is_never_promised(predictions):
  """No program that needs more than there is is predicted to leave 5% free."""
  for program in PROGRAMS:
    there = CHIPS[program.topology.partition(":")[0]].hbm_bytes / 1e9
    if program.memory > there:
      assert predictions[program.name]["memory"] > 0.95 * there
