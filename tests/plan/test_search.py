"""The search over meshes: what it tries, refuses, finds and prints."""

import json
import math
import subprocess
import sys

import jax
import pytest

from moejax.cli import flags as cli
from moejax.cli import plan as plan_cli
from moejax.config import Config, MeshConfig, ModelConfig, MoEConfig
from moejax.config import text as config_text
from moejax.config.devices import validate_devices
from moejax.cost.chips import CHIPS
from moejax.errors import ConfigError, UserError
from moejax.plan import candidates, confirm, search, throughput_map, topology
from moejax.plan.topology import parse


def small(batch_size: int = 2) -> Config:
  """A model and a batch of few ways to cut them."""
  config = Config(
    model=ModelConfig(
      num_layers=4,
      width=128,
      num_heads=4,
      num_kv_heads=2,
      hidden=256,
      vocab_size=512,
      dtype="bfloat16",
    ),
    moe=MoEConfig(num_experts=8, hidden=256, every=1, offset=0),
    mesh=MeshConfig(),
  )
  config.data.sequence_length, config.train.batch_size = 128, batch_size
  return config


@pytest.fixture(scope="module")
def found():
  return search.search(small(4), [parse("h100:1x4")])


def test_every_mesh_once():
  """All products of four sizes: 20 ways to write 8, none of them twice."""
  tried = [tuple(mesh.values()) for mesh in candidates.meshes(8)]
  assert len(set(tried)) == len(tried) == math.comb(3 + 3, 3)
  assert all(math.prod(sizes) == 8 for sizes in tried)


def test_divisors():
  assert candidates.divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]


def test_all_plans_pass_the_check_of_a_run(found):
  """What is printed runs: the check of a run's devices accepts every plan."""
  assert found.plans and not found.too_large
  for plan in found.plans:
    validate_devices(candidates.configured(small(4), plan.candidate), 4)


def test_what_a_run_refuses_is_left_out(found):
  """Four devices do not cut two key heads, which the check of a run says too."""
  meshes = [plan.candidate.mesh for plan in found.plans]
  assert {"data": 1, "fsdp": 1, "expert": 1, "tensor": 4} not in meshes
  config = small(4)
  config.mesh = MeshConfig(data=1, tensor=4)
  with pytest.raises(ConfigError, match=r"mesh\.tensor=4 does not divide"):
    validate_devices(config, 4)
  assert found.refused.counts["mesh.tensor"] > 0


def test_best_first(found):
  """The order is that of the objective, tokens per second without prices."""
  speeds = [plan.tokens_per_second for plan in found.plans]
  assert speeds == sorted(speeds, reverse=True)


def test_cost_orders_by_price():
  """A machine at half the speed is the best once it costs a hundredth."""
  machines = [parse("h100:1x2"), parse("v5e:1x2")]
  fast = search.search(small(), machines).plans[0].candidate.topology.kind
  slow = {"h100": "v5e", "v5e": "h100"}[fast]
  cheap = search.search(small(), machines, prices={fast: 100.0, slow: 1.0})
  assert cheap.plans[0].candidate.topology.kind == slow


def test_the_best_of_each_machine_is_shown_with_its_rank():
  """However far behind the best machine's plans it is."""
  fast, slow = parse("h200:1x2"), parse("v5e:1x2")
  found = search.search(small(), [slow, fast])
  ranks = [plan.candidate.topology for plan in found.plans]
  assert [(rank, plan.candidate.topology) for rank, plan in found.best(1)] == [
    (1, ranks[0]),
    (
      1 + ranks.index({fast: slow, slow: fast}[ranks[0]]),
      ({fast, slow} - {ranks[0]}).pop(),
    ),
  ]
  assert len(found.best(len(ranks))) == len(ranks)


def test_a_machine_on_which_nothing_fits_is_named_beside_one_that_fits():
  """With a margin that leaves a v5e less than the smallest plan, and an h200 more."""
  few, many = parse("v5e:1x2"), parse("h200:1x2")
  least = min(
    plan.memory.total for plan in search.search(small(), [few], margin=0.0).plans
  )
  margin = 1 - 0.9 * least / CHIPS["v5e"].hbm_bytes
  found = search.search(small(), [few, many], margin=margin)
  assert {plan.candidate.topology for plan in found.plans} == {many}
  assert list(found.lacking) == ["v5e:1x2"] and found.too_large
  assert "Nothing fits on v5e:1x2" in found.lacking["v5e:1x2"]
  assert f"--margin={margin:g} leaves" in found.lacking["v5e:1x2"]


def test_more_room_never_fits_less():
  """With room for the smallest plan only, some ways fit; with all memory, more do."""
  machine = parse("h100:1x2")
  everything = search.search(small(), [machine], margin=0.0)
  least = min(plan.memory.total for plan in everything.plans)
  margin = 1 - 1.001 * least / CHIPS["h100"].hbm_bytes
  tight = search.search(small(), [machine], margin=margin)
  assert 0 < tight.fitting < everything.fitting
  assert tight.considered == everything.considered


def test_nothing_fits_names_the_nearest():
  config = small()
  config.model.width, config.model.num_layers = 16_384, 64
  config.moe.hidden = config.model.hidden = 65_536
  with pytest.raises(
    UserError, match=r"Nothing fits on h100:1x2.*The nearest is .*more than"
  ):
    search.search(config, [parse("h100:1x2")])


def test_parameters_that_no_batch_makes_fit_ask_for_devices():
  """747 GB of parameters, moments and gradients: a smaller batch would not help."""
  config = cli.load_config("configs/mixtral_8x7b.py")
  with pytest.raises(UserError, match="alone are .* GB, more than 9 devices") as error:
    search.search(config, [parse("h100:1x1")])
  assert "batch_size" not in str(error.value)
  assert "larger machine, or lower --config.model.num_layers." in str(error.value)


def test_no_mesh_runs_names_the_reason():
  config = small()
  config.train.batch_size = 3
  with pytest.raises(UserError, match="No mesh of v5e:2x2 runs the config.*batch"):
    search.search(config, [parse("v5e:2x2")])


def test_refuses_what_it_has_no_formula_for():
  config = small()
  config.model.kind = "encoder_decoder"
  with pytest.raises(UserError, match="only decoders can be planned"):
    search.search(config, [parse("h100:1x8")])
  with pytest.raises(UserError, match="peak of cpu is unknown"):
    search.search(small(), [parse("cpu:8")])


def test_slices_cross_one_axis():
  """Two slices halve the axis that crosses them, and no other mesh is tried."""
  found = search.search(small(), [parse("v5e:1x1", 2)])
  for plan in found.plans:
    assert plan.candidate.mesh[plan.candidate.settings["mesh.slice_axis"]] % 2 == 0


def test_map(found, tmp_path):
  """A picture, or a page that holds one."""
  throughput_map.draw(found, str(tmp_path / "map.html"))
  page = (tmp_path / "map.html").read_text()
  assert page.startswith("<!doctype html>") and page.rstrip().endswith("</svg>")
  throughput_map.draw(found, str(tmp_path / "map.png"))
  assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_confirmed_in_one_line():
  """Predicted beside compiled with the error of each; or what the compiler said."""
  figures = {"memory": 9e9, "flops": 4e12, "wire": 0.0}
  result = {
    "name": "v5p:2x2x1 as fsdp 4",
    "predicted": figures,
    "compiled": figures | {"memory": 10e9},
    "fits": True,
    "has_kernels": True,
  }
  assert confirm.line(result) == (
    "v5p:2x2x1 as fsdp 4: fits; memory 9.0 GB predicted, 10.0 compiled (-10.0%); flops "
    "4.0T predicted, 4.0 compiled (+0.0%); wire 0.0 GB predicted, 0.0 compiled (+0.0%)"
  )
  refused = confirm.line(result | {"refusal": "RESOURCE_EXHAUSTED: no room"})
  assert refused == (
    "v5p:2x2x1 as fsdp 4: refused by the compiler: RESOURCE_EXHAUSTED: no room"
  )


def test_a_plan_on_which_the_compiler_fails_is_named_and_the_next_goes_on(
  found, monkeypatch
):
  """A fault of the compiler's own ends as a line of that plan."""

  def fail(*_):
    raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure (a.cc:1)\nmore")

  monkeypatch.setattr(confirm, "compile_step", fail)
  monkeypatch.setattr(topology, "devices_of", lambda _: jax.devices()[:4])
  said = confirm.line(confirm.compare(small(), found.plans[0]))
  assert said.endswith("refused by the compiler: INTERNAL: RET_CHECK failure (a.cc:1)")


def plan(*args: str) -> subprocess.CompletedProcess:
  command = [sys.executable, "-m", "tools.plan", *args]
  return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_command_line(tmp_path):
  """Prints the plans and a command whose flags make a config that runs on the machine."""
  values = tmp_path / "plan.json"
  done = plan(
    *("--topology=h100:1x4", "--config=configs/default.py", "--tokens=1e9"),
    *("--price=h100:2.5", f"--json={values}", "--top=3", "--config.model.dtype=bfloat16"),
  )
  assert done.returncode == 0, done.stderr
  assert "python -m experiments.train --config=configs/default.py" in done.stdout
  written = json.loads(values.read_text())
  assert len(written["plans"]) > 3 and written["nothing_fits"] == {}
  best = written["plans"][0]
  assert f"As a job on h100:1x4 (docs/launching.md): {best['launch']}" in done.stdout
  job = "python -m tools.launch --target=gke-gpu --topology=h100:1x4 --image=IMAGE"
  assert best["launch"].startswith(f"{job} --config=configs/default.py --workdir=/runs/")
  hours = 1e9 / best["tokens_per_second"] / 3600 * 4
  assert best["chip_hours"] == pytest.approx(hours)
  assert best["dollars"] == pytest.approx(2.5 * hours)
  words = [w for w in best["command"].split() if w.startswith("--config")]
  config = _config_of(words)
  assert config.model.dtype == "bfloat16"
  validate_devices(config, 4)


def _config_of(words: list[str]) -> Config:
  """The config that a program makes of a command's words."""
  config = cli.load_config(words[0].partition("=")[2])
  for word in words[1:]:
    name, _, value = word.removeprefix("--config.").partition("=")
    config_text.set_field(config, name, config_text.parse_value(name, value))
  return config


@pytest.mark.parametrize(
  ("topology", "price", "needed", "message"),
  [
    ([], [], False, "--topology is missing"),
    (["v5q:4x4"], [], False, "Did you mean v5"),
    (
      *(["h100:1x8"], [], True),
      "--objective=cost needs a price of h100: --price=h100:DOLLARS",
    ),
    (["h100:1x8"], ["h200:3"], False, "--price=h200:3: Did you mean h100"),
    (["h100:1x8"], ["h100=3"], False, "--price=h100=3: give KIND:DOLLARS, .* h100:4.2"),
    (["h100:1x8"], ["h100:free"], False, "give dollars per chip hour"),
  ],
)
def test_bad_input(topology, price, needed, message):
  """One line that names flag, value and remedy, before anything is searched."""
  with pytest.raises(UserError, match=message) as error:
    plan_cli.prices(plan_cli.machines(topology), price, needed=needed)
  assert "\n" not in str(error.value)


def test_a_map_is_a_picture():
  with pytest.raises(UserError, match=r"--map=map.pdf: .* ends in .png or .html"):
    plan_cli.check_outputs(None, "map.pdf")


def test_files_that_cannot_be_written_are_one_line(tmp_path):
  """Found before the search, which may take a minute; a file that can is not made."""
  missing, folder = tmp_path / "no" / "x", tmp_path / "x.png"
  folder.mkdir()
  with pytest.raises(
    UserError, match=r"--json=.*no/x: the directory .*no does not exist"
  ) as e:
    plan_cli.check_outputs(str(missing), None)
  assert "\n" not in str(e.value) and e.value.exit_code == 2
  with pytest.raises(UserError, match=r"--map=.*x.png is a directory"):
    plan_cli.check_outputs(None, str(folder))
  with pytest.raises(UserError, match="--json=/dev/null is a device"):
    plan_cli.check_outputs("/dev/null", None)
  plan_cli.check_outputs(str(tmp_path / "there.json"), str(tmp_path / "there.png"))
  assert list(tmp_path.iterdir()) == [folder]


def test_bad_input_ends_with_exit_code_2():
  done = plan("--topology=v5q:4x4")
  assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
