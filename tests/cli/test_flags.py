"""The command line: right words are taken in any order, wrong ones are one line.

Here parsing, in this process; what a shell sees is in test_programs.py.
"""

import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from configs import default
from moejax.cli import flags as cli
from moejax.config import Config
from moejax.errors import ConfigError, UserError, did_you_mean, nearest
from moejax.routing.registry import ROUTERS


@pytest.fixture(autouse=True)
def _flags():
  """Flags as a program would have them, and as they were afterwards."""
  cli.define_config()
  with flagsaver.flagsaver(config=cli.DEFAULT_CONFIG, workdir=None, list=None):
    yield
    cli.parse(["program"])
  flags.FLAGS.mark_as_parsed()


def get(*arguments: str) -> Config:
  cli.parse(["program", *arguments])
  return cli.get_config()


def refused(*arguments: str) -> str:
  with pytest.raises(UserError) as caught:
    get(*arguments)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_a_flag_that_is_no_number_is_told_so():
  """In the words of all other flags, not in those of Python."""
  flags.DEFINE_integer("a_step", None, "A step.", lower_bound=0)
  flags.DEFINE_float("a_share", None, "A share.")
  try:
    assert refused("--a_step=last") == "--a_step=last: expected a whole number."
    assert refused("--a_share=half") == "--a_share=half: expected a number."
    assert "--a_step=-1: -1 is not" in refused("--a_step=-1")
  finally:
    for name in ("a_step", "a_share"):
      delattr(flags.FLAGS, name)


def test_an_option_of_another_router_is_refused_where_a_person_gave_it(tmp_path):
  """On the line and in a file; a config stored with a run is read as it is."""
  flag, chosen = "--config.moe.quantile_bias.quantile_rate=0.5", {"quantile_rate": 0.5}
  assert "router=quantile_bias" in refused(flag)
  got = get(flag, "--config.moe.router=quantile_bias")
  assert got.moe.router_options == chosen
  file = tmp_path / "mine.py"
  file.write_text(
    "from moejax.config import Config\n"
    "def get_config():\n"
    "  config = Config()\n"
    "  config.moe.use_router('quantile_bias', quantile_rate=0.5)\n"
    "  config.moe.router = 'switch'\n"
    "  return config\n"
  )
  assert "moe.quantile_bias.quantile_rate=0.5" in refused(f"--config={file}")
  text = file.read_text().replace("  config.moe.router = 'switch'\n", "")
  file.write_text(text)
  assert get(f"--config={file}").moe.router_options == chosen
  other = get(f"--config={file}", "--config.moe.router=top_k")  # They go with the router.
  assert (other.moe.router, other.moe.options) == ("top_k", {})
  stored = Config()
  stored.moe.options = {"quantile_bias": chosen}
  cli.parse(["program"])
  assert cli.get_config(base=stored).moe.options == {"quantile_bias": chosen}


@pytest.mark.parametrize(
  ("line", "part"),
  [
    ("top2.second_policy=randm", "second_policy=randm is unknown. Did you mean random?"),
    ("top2.second_polcy=random", "Did you mean --config.moe.top2.second_policy?"),
    ("topp2.second_policy=random", "Did you mean --config.moe.top2.second_policy?"),
    ("second_policy=random", "option of a router: --config.moe.top2.second_policy."),
    ("switch.second_policy=random", "there is no such option. It has none."),
    ("sigmoid_bias.bias_update_rate=x", "bias_update_rate=x: expected a number."),
    ("sigmoid_bias.bias_update_rate=-1", "must be at least 0 and at most 10"),
    ("noisy_top_k.noise_std=1e400", "noise_std=inf must be at least 0"),
    ("sigmoid_bias=1", "It is a group of options; --list=routers shows them."),
  ],
)
def test_an_option_of_a_router_is_checked_as_its_class_declares(line, part):
  """Its name, its type, its words and its range, each with a way out."""
  router = line.partition(".")[0]
  chosen = [f"--config.moe.router={router}"] if router in ROUTERS else []
  if router == "top2":
    chosen.append("--config.moe.num_selected=2")
  assert part in refused(f"--config.moe.{line}", *chosen)


def test_overrides_reach_their_fields():
  config = get(
    "--config.moe.num_experts=16",
    "--config.moe.capacity_factor",
    "none",
    "-config.optimizer.learning_rate=1e-2",
    "--noconfig.train.tensorboard",
    "--config.model.qk_norm",
  )
  assert config.moe.num_experts == 16
  assert config.moe.capacity_factor is None
  assert config.optimizer.learning_rate == 0.01
  assert not config.train.tensorboard
  assert config.model.qk_norm


@pytest.mark.parametrize("reverse", [False, True])
def test_overrides_may_stand_before_the_config(reverse):
  """The order of --config and its overrides does not matter."""
  arguments = ["--config=configs/default.py", "--config.train.seed=5"]
  assert get(*(arguments[::-1] if reverse else arguments)).train.seed == 5


def test_the_last_override_wins():
  assert get("--config.train.seed=5", "--config.train.seed=6").train.seed == 6


def test_overrides_of_one_parse_are_gone_at_the_next():
  assert get("--config.train.seed=5").train.seed == 5
  assert get().train.seed == Config().train.seed


def test_every_call_returns_a_new_config():
  first = get()
  first.moe.num_experts = 99
  assert cli.get_config().moe.num_experts != 99


def test_overrides_are_laid_over_a_base_which_stays_as_it_is():
  """Evaluation overrides fields of the config that a run stored."""
  base = Config()
  base.moe.num_experts = 32
  cli.parse(["program", "--config.data.sequence_length=64"])
  config = cli.get_config(base)
  assert (config.moe.num_experts, config.data.sequence_length) == (32, 64)
  assert base.data.sequence_length == Config().data.sequence_length
  assert cli.overrides() == {"data.sequence_length": 64}


def test_overrides_in_a_flagfile(tmp_path):
  file = tmp_path / "flags"
  file.write_text("--config.train.seed=5\n")
  assert get(f"--flagfile={file}").train.seed == 5


@pytest.mark.parametrize(
  ("argument", "part"),
  [
    ("--config.moe.num_expert=16", "Did you mean --config.moe.num_experts?"),
    ("--config.mo.num_experts=16", "Did you mean --config.moe.num_experts?"),
    ("--config.num_experts=16", "Did you mean --config.moe.num_experts?"),
    ("--num_experts=16", "Did you mean --config.moe.num_experts?"),
    ("--moe.num_experts=16", "Did you mean --config.moe.num_experts?"),
    ("--cofig.moe.num_experts=16", "Did you mean --config.moe.num_experts?"),
    ("--workdr=x", "Did you mean --workdir?"),
    ("--confg=x", "Did you mean --config?"),
    ("--zzzzzz=x", "--help lists all flags."),
    ("--config.moe.num_experts=many", "=many: expected a whole number"),
    ("--config.moe.num_experts=8.5", "=8.5: expected a whole number"),
    ("--config.moe.num_experts=none", "=none: expected a whole number"),
    ("--config.moe.num_experts", "no value given; expected a whole number"),
    ("--config.moe.capacity_factor=much", "expected a number or none"),
    ("--config.optimizer.clip_norm=none", "=none: expected a number."),
    ("--config.train.tensorboard=maybe", "expected true or false"),
    ("--noconfig.moe.num_experts", "write --config.moe.num_experts=VALUE"),
    ("--config.moe=3", "group of fields"),
    ("--config.schema_version=7", "schema_version=7"),
    ("--config.moe.num_experts=0", "--config.moe.num_experts=0 must be at least 1"),
    ("--config.moe.num_experts=100000000000000000000", "must be at least 1 and at most"),
    ("--config.model.hidden=" + "9" * 400, "at most 16,777,216 (no device can hold"),
    ("--config.train.num_steps=100000000000000000000", "counted in 32 bits"),
    ("--config.moe.capacity_factor=1e30", "every token a slot in every expert"),
    ("--config.optimizer.learning_rate=1e10", "at most 10 (a step moves"),
    ("--config.moe.router=swich", "Did you mean switch?"),
    ("--config=configs/defualt.py", "no such file. Did you mean default?"),
    ("--config=configs", "is a directory"),
    ("--list=everything", "--list=everything"),
    ("--flagfile=/no/such/file", "/no/such/file"),
    ("moe.num_experts=16", "is not a flag"),
  ],
)
def test_refused(argument, part):
  """One line that names what was written, and the nearest right thing."""
  assert part in refused(argument)


@pytest.mark.parametrize(
  ("text", "part"),
  [
    ("x = 1\n", "needs a function get_config() that returns a moejax.config.Config"),
    ("def get_config():\n  return {}\n", "returns a dict"),
    ("import no_such_module\n", ":1: ModuleNotFoundError: No module named"),
    (
      "x = 1\ndef get_config(:\n",
      "mine.py:2: SyntaxError: invalid syntax: def get_config(",
    ),
    ("import sys\nsys.exit(3)\n", "exits at "),
    ("def get_config():\n  exit()\n", "mine.py:2"),
    ("def get_config():\n  raise SystemExit('bye')\n", "mine.py:2 ('bye')"),
    ("import json\ndef get_config():\n  json.loads('{')\n", "mine.py:3: JSONDecodeError"),
    ("raise ValueError('one\\ntwo')\n", "mine.py:1: ValueError: one two"),
    ("x = '\\0'\n\0", "mine.py"),
    ("def get_config():\n  return 1 / 0\n", ":2: ZeroDivisionError"),
    (
      "from moejax.config import *\n"
      "def get_config():\n  return Config(moe=MoEConfig(num_expert=3))\n",
      "num_expert",
    ),
  ],
)
def test_a_config_file_that_fails_is_refused(tmp_path, text, part):
  file = tmp_path / "mine.py"
  file.write_text(text)
  message = refused(f"--config={file}")
  assert part in message and "mine.py" in message


def test_ctrl_c_in_a_config_file_is_no_fault_of_the_file(tmp_path):
  """It ends the program as anywhere else."""
  file = tmp_path / "mine.py"
  file.write_text("raise KeyboardInterrupt\n")
  with pytest.raises(KeyboardInterrupt):
    get(f"--config={file}")


def test_what_is_announced_has_passed_all_that_is_checked_at_once():
  """Called before the checks that import jax, and never for a bad value."""
  said = []
  cli.parse(["program", "--config.moe.num_experts=16"])
  cli.get_config(announce=lambda: said.append("start"))
  assert said == ["start"]
  cli.parse(["program", "--config.moe.num_experts=0"])
  with pytest.raises(ConfigError):
    cli.get_config(announce=lambda: said.append("again"))
  assert said == ["start"]


@pytest.mark.parametrize("given", [None, "no/such/directory", "file"])
def test_the_directory_of_a_run_must_be_one(tmp_path, monkeypatch, given):
  """The error says what was given, and which directory is wanted."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "file").write_text("")
  cli.parse(["program", *([] if given is None else [f"--workdir={given}"])])
  with pytest.raises(UserError, match="experiments.train was given") as caught:
    cli.run_directory()
  assert f"--workdir={given or 'DIR'} " in str(caught.value)


def test_a_config_file_that_is_no_python_is_refused(tmp_path):
  (tmp_path / "mine.yaml").write_text("{}")
  assert "must end in .py" in refused(f"--config={tmp_path / 'mine.yaml'}")


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"model_type": "mixtral"}'])
def test_a_json_file_that_is_no_stored_config_is_refused(tmp_path, text):
  """Not taken for a run with every default, nor the config.json of another library."""
  (tmp_path / "config.json").write_text(text)
  said = refused(f"--config={tmp_path / 'config.json'}")
  assert "cannot be read as a stored config" in said and "convert" in said


def test_a_config_file_of_ones_own_is_read(tmp_path, monkeypatch):
  """And nothing is left beside it: a sweep keeps one in each run's directory."""
  monkeypatch.setattr(sys, "dont_write_bytecode", False)
  file = tmp_path / "mine.py"
  file.write_text(
    "from moejax.config import Config, TrainConfig\n\n"
    "def get_config():\n  return Config(train=TrainConfig(seed=3))\n"
  )
  assert get(f"--config={file}").train.seed == 3
  assert list(tmp_path.iterdir()) == [file] and not sys.dont_write_bytecode


@pytest.mark.parametrize("name", ["default", "default.py", "configs/default.py"])
def test_shipped_configs_are_found_from_any_directory(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  assert cli.load_config(name) == default.get_config()


def test_nearest_forgives_hyphens_and_capitals():
  assert nearest("Before-Drop", ["none", "before_drop"]) == "before_drop"
  assert nearest("xyzzy", ["none", "before_drop"]) is None
  assert did_you_mean("xyzzy", ["a", "b"]) == "Choose from a, b."


def test_config_error_is_a_user_error():
  assert issubclass(ConfigError, UserError)
