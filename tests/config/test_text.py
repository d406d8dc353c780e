"""A config survives the trip through text, and nothing unknown slips into one."""

import dataclasses
import json
import pathlib

import pytest

from moejax.cli import flags as cli
from moejax.cli.listing import shipped_configs
from moejax.config import Config
from moejax.config import text as config_text
from moejax.config.schema import SCHEMA_VERSION
from moejax.errors import ConfigError
from tools import dump_config

CHANGED = {
  "moe.num_experts": 3,
  "moe.capacity_factor": None,
  "optimizer.learning_rate": 0.25,
  "data.name": "lm1b",
  "train.tensorboard": False,
}


def changed() -> Config:
  config = Config()
  for dotted, value in CHANGED.items():
    config_text.set_field(config, dotted, value)
  return config


def test_json_round_trip_is_the_identity():
  """What config.json holds is the config, whichever field differs from its default."""
  text = json.dumps(config_text.to_dict(changed()))
  assert config_text.from_dict(json.loads(text)) == changed()


def test_to_dict_shares_nothing_with_the_config():
  config = Config()
  config_text.to_dict(config)["moe"]["num_experts"] = 99
  assert config.moe.num_experts == Config().moe.num_experts


def test_from_dict_leaves_its_argument_alone():
  values = config_text.to_dict(changed())
  before = json.dumps(values)
  config_text.from_dict(values)
  assert json.dumps(values) == before


def test_every_leaf_has_a_dotted_name():
  """The names are the leaves of the nested dict, in the order of the file."""
  flat = [
    f"{section}.{leaf}" if isinstance(values, dict) else section
    for section, values in config_text.to_dict(Config()).items()
    for leaf in (values if isinstance(values, dict) else [section])
  ]
  assert list(config_text.field_types()) == flat


def test_a_float_takes_an_int_and_stores_a_float():
  """JSON and people write 1 for 1.0; the two must not differ in `difference`."""
  config = Config()
  config_text.set_field(config, "optimizer.clip_norm", 1)
  assert type(config.optimizer.clip_norm) is float
  assert config_text.difference(Config(), config) == []


@pytest.mark.parametrize(
  ("dotted", "value"),
  [
    ("moe.num_experts", 8.0),
    ("moe.num_experts", True),
    ("moe.num_experts", None),
    ("moe.capacity_factor", "1.25"),
    ("optimizer.clip_norm", None),
    ("train.tensorboard", 1),
    ("data.name", 3),
  ],
)
def test_a_value_of_another_type_is_refused(dotted, value):
  with pytest.raises(ConfigError, match=f"--config.{dotted}="):
    config_text.set_field(Config(), dotted, value)


def test_difference_names_the_fields_that_differ_and_only_those():
  found = {
    name: (old, new) for name, old, new in config_text.difference(Config(), changed())
  }
  assert set(found) == set(CHANGED)
  assert found["moe.num_experts"] == (Config().moe.num_experts, 3)


def test_an_unknown_field_is_an_error_that_names_it():
  values = config_text.to_dict(Config())
  values["moe"]["num_expert"] = 3
  with pytest.raises(ConfigError, match=r"moe\.num_expert:.*moe\.num_experts"):
    config_text.from_dict(values)


def test_a_value_where_a_section_belongs_is_an_error():
  with pytest.raises(ConfigError, match=r"--config\.moe: .*group of fields"):
    config_text.from_dict({"moe": 3})


def test_absent_fields_take_their_defaults():
  """A checkpoint older than a field stays readable, and means what it meant."""
  values = config_text.to_dict(changed())
  del values["moe"]["segments"], values["mesh"]
  assert config_text.from_dict(values) == changed()


def test_migrations_run_in_order(monkeypatch):
  """A config of version n passes through n -> n+1 -> ... and arrives current."""

  def rename(values):
    moe = dict(values["moe"])
    moe["num_experts"] = moe.pop("experts")
    return {**values, "moe": moe}

  def double(values):
    moe = dict(values["moe"])
    return {**values, "moe": {**moe, "num_experts": 2 * moe["num_experts"]}}

  monkeypatch.setattr(config_text, "SCHEMA_VERSION", 3)
  monkeypatch.setattr(config_text, "MIGRATIONS", {1: rename, 2: double})
  config = config_text.from_dict({"schema_version": 1, "moe": {"experts": 5}})
  assert config.moe.num_experts == 10
  assert config.schema_version == 3


def test_there_is_a_migration_for_every_older_schema():
  assert sorted(config_text.MIGRATIONS) == list(range(1, SCHEMA_VERSION))


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, "1", None, True])
def test_a_schema_from_elsewhere_is_refused(version):
  with pytest.raises(ConfigError, match="schema_version"):
    config_text.from_dict({"schema_version": version})


@pytest.mark.parametrize(
  ("dotted", "text", "value"),
  [
    ("moe.num_experts", "16", 16),
    ("moe.capacity_factor", "1.5", 1.5),
    ("moe.capacity_factor", "2", 2.0),
    ("moe.capacity_factor", "None", None),
    ("moe.eval_capacity_factor", "none", None),
    ("train.tensorboard", "False", False),
    ("train.tensorboard", "1", True),
    ("data.path", "a=b none", "a=b none"),
    ("data.path", "none", "none"),
    ("optimizer.learning_rate", "3e-4", 3e-4),
  ],
)
def test_values_on_the_command_line(dotted, text, value):
  parsed = config_text.parse_value(dotted, text)
  assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
  ("dotted", "text"),
  [
    ("moe.num_experts", "8.0"),
    ("moe.num_experts", ""),
    ("moe.num_experts", "none"),
    ("optimizer.clip_norm", "none"),
    ("moe.capacity_factor", "dropless"),
    ("train.tensorboard", "maybe"),
  ],
)
def test_text_that_is_no_value_is_refused(dotted, text):
  with pytest.raises(ConfigError, match=f"--config.{dotted}={text}: expected"):
    config_text.parse_value(dotted, text)


@pytest.mark.parametrize(
  ("wrong", "right"),
  [
    ("moe.num_expert", "moe.num_experts"),
    ("moe.numexperts", "moe.num_experts"),
    ("moe.num-experts", "moe.num_experts"),
    ("model.num_experts", "moe.num_experts"),
    ("moe.learning_rate", "optimizer.learning_rate"),
    ("optimiser.learning_rate", "optimizer.learning_rate"),
    ("train.num_step", "train.num_steps"),
  ],
)
def test_the_nearest_name_is_suggested(wrong, right):
  with pytest.raises(ConfigError, match=f"Did you mean --config.{right}\\?"):
    config_text.check_name(wrong)


def test_goldens_of_every_shipped_config():
  """A changed default shows in review, under each config that it reaches.

  If the change is meant: python -m tools.dump_config --update_goldens
  """
  expected = dump_config.goldens()
  kept = {p: p.read_text("utf-8") for p in dump_config.GOLDENS.rglob("*.txt")}
  assert kept == expected


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_is_valid_and_documented(name):
  """It passes `validate`, and its docstring holds command, hardware and result."""
  config = cli.get_config(cli.load_config(name))
  assert dataclasses.is_dataclass(config)
  text = pathlib.Path(shipped_configs()[name]).read_text("utf-8")
  for word in ("Command:", "Hardware:", "Result:"):
    assert word in text, f"{name} does not state its {word}"
