"""Every bad configuration is one error that names the flag, its value and a way out."""

import math
import re
import types

import pytest

from configs import default
from moejax import config_check, config_devices, config_io
from moejax.config import Config
from moejax.config_ranges import CHOICES, RANGES, Range
from moejax.dispatch.registry import DISPATCHERS
from moejax.errors import ConfigError
from moejax.routing import base
from moejax.routing.registry import ROUTERS


def make(**fields: object) -> Config:
  """A config with fields set by dotted name, a dot written as two underscores."""
  config = Config()
  for name, value in fields.items():
    section, leaf = name.split("__")
    setattr(getattr(config, section), leaf, value)
  return config


def refusal(config: Config) -> str:
  with pytest.raises(ConfigError) as caught:
    config_check.validate(config)
  message = str(caught.value)
  assert "\n" not in message
  return message


def test_the_default_is_valid():
  config_check.validate(Config())


TOP_K = {"moe__router": "top_k"}

REFUSED = [
  # What the fields are by themselves.
  (dict(moe__num_experts=0), "--config.moe.num_experts=0 must be at least 1"),
  (dict(moe__num_experts=-8), "--config.moe.num_experts=-8"),
  (dict(moe__num_selected=0), "--config.moe.num_selected=0"),
  (dict(moe__num_experts=8.0), "--config.moe.num_experts=8.0: expected a whole number"),
  (dict(moe__num_experts=None), "--config.moe.num_experts=none: expected a whole number"),
  (dict(moe__capacity_factor=0.0), "--config.moe.capacity_factor=0.0 must be above 0"),
  (dict(moe__capacity_factor=-1.0), "--config.moe.capacity_factor=-1.0"),
  (dict(moe__eval_capacity_factor=0.0), "--config.moe.eval_capacity_factor=0.0"),
  (dict(moe__capacity_factor=float("nan")), "--config.moe.capacity_factor=nan"),
  (dict(moe__capacity_factor=float("inf")), "--config.moe.capacity_factor=inf"),
  (dict(moe__jitter=1.0), "--config.moe.jitter=1.0 must be at least 0 and below 1"),
  (dict(moe__balance_weight=-0.1), "--config.moe.balance_weight=-0.1"),
  (dict(moe__every=0), "--config.moe.every=0"),
  (dict(moe__min_capacity=0), "--config.moe.min_capacity=0"),
  (dict(model__num_layers=0), "--config.model.num_layers=0"),
  (dict(model__width=0), "--config.model.width=0"),
  (dict(model__num_heads=0), "--config.model.num_heads=0"),
  (dict(model__qk_norm=1), "--config.model.qk_norm=1: expected true or false"),
  (dict(data__sequence_length=0), "--config.data.sequence_length=0"),
  (dict(data__validation_fraction=1.0), "--config.data.validation_fraction=1.0"),
  (dict(data__test_fraction=-0.1), "--config.data.test_fraction=-0.1"),
  (dict(data__vocab_size=256), "--config.data.vocab_size=256"),
  (dict(optimizer__learning_rate=0.0), "--config.optimizer.learning_rate=0.0"),
  (dict(optimizer__learning_rate=None), "--config.optimizer.learning_rate=none"),
  (dict(optimizer__beta2=1.0), "--config.optimizer.beta2=1.0"),
  (dict(optimizer__warmup_steps=-1), "--config.optimizer.warmup_steps=-1"),
  (dict(optimizer__final_fraction=1.5), "--config.optimizer.final_fraction=1.5"),
  (dict(train__num_steps=0), "--config.train.num_steps=0"),
  (dict(train__batch_size=0), "--config.train.batch_size=0"),
  (dict(train__eval_every=-1), "--config.train.eval_every=-1"),
  (dict(train__checkpoint_every=-1), "--config.train.checkpoint_every=-1"),
  (dict(train__keep_last=0), "--config.train.keep_last=0"),
  (dict(train__seed=-1), "--config.train.seed=-1"),
  # Names, with the nearest valid one.
  (dict(optimizer__name="adamW2"), "adamW2 is unknown. Did you mean adamw?"),
  (dict(optimizer__schedule="cosin"), "Did you mean cosine?"),
  (dict(data__tokenizer="byte"), "Did you mean bytes?"),
  (dict(model__activation="swish-glu"), "Did you mean swiglu?"),
  (dict(model__dtype="float16"), "--config.model.dtype=float16 is unknown."),
  (dict(model__remat="half"), "Choose from none, full, all, dots."),
  (
    dict(moe__router="swich"),
    "--config.moe.router=swich is unknown. Did you mean switch?",
  ),
  (dict(moe__dispatcher="grouping"), "Did you mean grouped?"),
  (dict(moe__dispatcher=""), "Choose from auto, "),
  # What they are together.
  (
    dict(moe__num_experts=4, moe__num_selected=5),
    "a token cannot choose an expert twice",
  ),
  (dict(moe__renormalize="before_drop"), "the router gets no gradient"),
  (dict(moe__renormalize="after_drop", **TOP_K), "the router gets no gradient"),
  (dict(moe__num_selected=2), "--config.moe.router=top_k"),
  (dict(moe__segments=2), "--config.moe.segments=2"),
  (dict(moe__router="top2"), "chooses 2 per token"),
  (
    dict(moe__segments=3, **TOP_K),
    "--config.moe.segments=3 with --config.moe.hidden=512",
  ),
  (dict(moe__second_policy="random"), "only router top2"),
  (dict(moe__offset=4, moe__every=8), "makes no layer an MoE layer"),
  (dict(moe__dense_prefix=4), "makes no layer an MoE layer"),
  (dict(model__width=130), "--config.model.width=130 with --config.model.num_heads=4"),
  (dict(model__width=12), "makes heads of width 3"),
  (dict(model__head_dim=7), "--config.model.head_dim=7 makes heads of width 7"),
  (dict(model__num_kv_heads=3), "--config.model.num_kv_heads=3"),
  (dict(model__num_kv_heads=8), "--config.model.num_kv_heads=8"),
  (dict(model__vocab_size=100), "has no room for the 257 ids"),
  (dict(model__vocab_size=300, data__tokenizer="bpe"), "the 2048 ids"),
  (dict(model__max_position=100), "--config.model.max_position=100"),
  (dict(data__validation_fraction=0.5, data__test_fraction=0.5), "nothing to train on"),
  (dict(data__name="text"), "needs --config.data.path"),
  (dict(data__path="/somewhere"), "add --config.data.name=text"),
  (dict(data__name=""), "--list=datasets"),
  (dict(train__accumulation=3), "--config.train.accumulation=3"),
  (dict(moe__exchange="all_to_all", moe__capacity_factor=None), "dropless has none"),
  (dict(moe__exchange="ring", moe__exchange_buffer=1.5), "--config.moe.exchange=ragged"),
  (
    dict(moe__balance_counts="first", moe__balance_scope="batch", train__accumulation=2),
    "balance_counts=all",
  ),
  (
    dict(
      moe__balance_counts="first",
      moe__router="expert_choice",
      moe__eval_capacity_factor=1.0,
    ),
    "no first choice",
  ),
  (dict(moe__expert_dropout=0.5, moe__router="hash"), "--config.moe.expert_dropout=0"),
  (dict(moe__expert_dropout=1.0), "--config.moe.expert_dropout=1.0"),
  (dict(moe__group_size=-2), "--config.moe.group_size=-2"),
  (dict(moe__group_size=1000), "does not divide the 4096 tokens of a microbatch"),
  (dict(moe__group_size=4096, train__accumulation=2), "does not divide the 2048 tokens"),
  (dict(mesh__data=0), "--config.mesh.data=0"),
  (dict(mesh__fsdp=-1), "--config.mesh.data=-1 --config.mesh.fsdp=-1"),
  (dict(mesh__tensor=-2), "--config.mesh.tensor=-2"),
]


@pytest.mark.parametrize(("fields", "part"), REFUSED, ids=lambda x: str(x)[:60])
def test_refused(fields, part):
  """The error names what was given, and says what to do."""
  message = refusal(make(**fields))
  assert part in message
  assert "--config." in message


ACCEPTED = [
  dict(moe__capacity_factor=None),
  dict(moe__num_experts=1),
  dict(moe__num_experts=4, moe__num_selected=4, **TOP_K),
  dict(moe__num_selected=2, moe__renormalize="before_drop", **TOP_K),
  dict(moe__segments=2, moe__renormalize="before_drop", **TOP_K),
  dict(moe__router="top2", moe__num_selected=2, moe__second_policy="random"),
  dict(moe__every=1),
  dict(moe__every=1, moe__dense_prefix=3),
  dict(moe__dense_twin=True),
  dict(moe__group_size=64),
  dict(moe__group_size=4096),
  dict(moe__balance_scope="batch"),
  dict(train__accumulation=16),
  dict(train__accumulation=2, moe__balance_scope="batch"),
  dict(moe__expert_dropout=0.5, moe__overflow="next_best"),
  dict(model__num_kv_heads=1),
  dict(model__num_heads=3, model__head_dim=32),
  dict(optimizer__warmup_steps=0, optimizer__schedule="inverse_sqrt"),
  dict(train__num_steps=1),
  dict(moe__capacity_factor=2),
  *(dict(moe__capacity_factor=None, moe__dispatcher=name) for name in DISPATCHERS),
]


@pytest.mark.parametrize("fields", ACCEPTED, ids=lambda x: str(x)[:60])
def test_accepted(fields):
  """The checks refuse what cannot work, and nothing beside it."""
  config_check.validate(make(**fields))


def test_a_config_of_another_schema_is_refused():
  config = Config(schema_version=99)
  assert "schema_version=99" in refusal(config)


def test_every_number_has_a_range_and_every_range_a_number():
  """A new numeric field cannot be forgotten here."""
  numbers = {
    name for name, (kind, _) in config_io.field_types().items() if kind in (int, float)
  }
  assert set(RANGES) == numbers - {"schema_version"}


def test_every_number_is_bounded_on_both_sides_and_says_why():
  """Nothing absurd passes; where an end is not 0 or 1 the error has a reason."""
  for name, allowed in RANGES.items():
    assert math.isfinite(allowed.low) and math.isfinite(allowed.high), name
    assert allowed.high <= 1 or allowed.reason(allowed.high * 2), name


@pytest.mark.parametrize(
  "value", [10**20, -(10**20), 10**400], ids=["1e20", "-", "1e400"]
)
def test_an_absurd_number_is_one_line(value):
  """Of every field, in a file as on the command line; never a traceback."""
  for name in RANGES:
    config = Config()
    config_io.set_field(config, name, value)
    assert f"--config.{name}=" in refusal(config)
    config_io.set_field(config, name, config_io.parse_value(name, str(value)))
    assert f"--config.{name}=" in refusal(config)


def test_every_word_has_choices_or_is_free():
  """A new enum-like field cannot be forgotten here."""
  free = {"data.name", "data.path", "data.cache_dir", "data.text_field"}
  registered = {"moe.router", "moe.dispatcher"}
  words = {name for name, (kind, _) in config_io.field_types().items() if kind is str}
  assert set(CHOICES) == words - free - registered


def test_every_default_is_a_choice_and_in_range():
  config = Config()
  for name, choices in CHOICES.items():
    assert config_io.get_field(config, name) in choices
  for name, allowed in RANGES.items():
    value = config_io.get_field(config, name)
    assert value is None or value in allowed


def test_choices_are_those_of_the_code_that_reads_them():
  """The tables here and the places that act on them cannot drift apart."""
  from typing import get_args

  from moejax.data.tokenizer import TOKENIZERS
  from moejax.train.optimizer import OPTIMIZERS

  assert set(CHOICES["optimizer.name"]) == set(OPTIMIZERS)
  assert set(CHOICES["data.tokenizer"]) == set(TOKENIZERS)
  assert set(CHOICES["moe.priority"]) == set(get_args(base.Priority))
  assert set(CHOICES["moe.renormalize"]) == set(get_args(base.Renormalize))
  assert set(CHOICES["moe.overflow"]) <= set(get_args(base.Overflow))


@pytest.mark.parametrize("router", ROUTERS)
def test_every_registered_router_passes(router):
  """A router is selected by its name alone, once it is in the registry."""
  spec = ROUTERS[router]
  fields = {"moe__num_selected": spec.num_selected or 2}
  if spec.needs_capacity:
    fields |= {"moe__capacity_factor": 2.0, "moe__eval_capacity_factor": 2.0}
  if router == "soft":
    fields |= {"moe__group_size": 32, "data__sequence_length": 64}
  config_check.validate(make(moe__router=router, **fields))


SOFT = dict(
  moe__router="soft",
  moe__num_selected=2,
  moe__capacity_factor=1.0,
  moe__eval_capacity_factor=1.0,
  moe__group_size=32,
  data__sequence_length=64,
)


@pytest.mark.parametrize(
  ("fields", "part"),
  [
    (dict(moe__eval_capacity_factor=2.0), "must be the same number"),
    (dict(moe__group_size=0), "group of fixed size"),
    (dict(moe__group_size=128, train__batch_size=16), "group of fixed size"),
    (dict(moe__dispatcher="gather"), "--config.moe.dispatcher=gather"),
  ],
)
def test_soft_needs_slots_that_stay(fields, part):
  """Its slots are parameters, so group, capacity and dispatcher must fit them."""
  assert part in refusal(make(**(SOFT | fields)))


@pytest.mark.parametrize(
  ("fields", "part"),
  [
    (dict(moe__num_expert_groups=3), "does not divide the 8 experts"),
    (dict(moe__num_expert_groups=4, moe__num_selected_groups=5), "not in 1..4"),
    (
      dict(moe__num_expert_groups=4, moe__num_selected_groups=1, moe__num_selected=3),
      "more than the 2 experts",
    ),
    (dict(moe__num_expert_groups=4, moe__group_best=3), "group_best=3"),
    (dict(moe__num_expert_groups=4, **TOP_K), "is not read by --config.moe.router=top_k"),
  ],
)
def test_groups_of_experts_must_fit(fields, part):
  """Group-limited choice: groups are equal, and hold as many experts as are chosen."""
  base = dict(moe__router="group_limited", moe__num_selected=2, moe__num_experts=8)
  assert part in refusal(make(**(base | fields)))


def test_dropless_is_refused_for_routers_that_need_slots():
  """Also in evaluation, whose capacity factor is another flag."""
  for train, evaluate in ((None, 1.0), (1.0, None)):
    config = make(
      moe__router="expert_choice",
      moe__capacity_factor=train,
      moe__eval_capacity_factor=evaluate,
    )
    assert "needs slots" in refusal(config)


def test_next_best_needs_a_capacity_in_training_only():
  """Evaluation is dropless by default, and then nothing overflows."""
  config_check.validate(make(moe__overflow="next_best", moe__num_selected=2, **TOP_K))
  config = make(moe__overflow="next_best", moe__capacity_factor=None)
  assert "nothing to do with --config.moe.capacity_factor=none" in refusal(config)


@pytest.mark.parametrize(
  ("allowed", "text", "inside", "outside"),
  [
    (Range(1), "at least 1", [1, 7], [0, 0.9]),
    (Range(0, low_open=True), "above 0", [1e-30], [0, -1]),
    (Range(0, 1, high_open=True), "at least 0 and below 1", [0, 0.5], [1, -0.1]),
    (Range(0, 1, low_open=True), "above 0 and at most 1", [1, 0.1], [0, 1.1]),
  ],
)
def test_ranges_say_what_they_accept(allowed, text, inside, outside):
  assert str(allowed) == text
  assert all(value in allowed for value in inside)
  outside = [*outside, float("inf"), float("-inf"), float("nan")]
  assert not any(value in allowed for value in outside)


DEVICES_REFUSED = [
  (dict(mesh__data=3), "--config.mesh.data=3"),
  (dict(mesh__data=16), "--config.mesh.data=16"),
  (dict(train__batch_size=12), "8 devices"),
  (dict(train__accumulation=4), "--config.train.accumulation=4"),
  (
    dict(mesh__expert=8, moe__num_experts=4, mesh__data=1),
    "--config.mesh.expert=8 does not divide --config.moe.num_experts",
  ),
  (dict(mesh__tensor=8), "--config.mesh.tensor=8 does not divide"),
  (
    dict(mesh__fsdp=4, model__width=130, model__num_heads=5),
    "--config.mesh.fsdp=4 does not divide --config.model.width",
  ),
  (dict(mesh__tensor=2, model__num_kv_heads=1), "--config.model.num_kv_heads (1)"),
  (dict(moe__group_size=-1), "--config.moe.group_size=-1 makes 1 routing group(s)"),
  (dict(moe__group_size=1024), "makes 4 routing group(s) of a microbatch, which 8"),
]


@pytest.mark.parametrize(("fields", "part"), DEVICES_REFUSED, ids=lambda x: str(x)[:60])
def test_devices_refused(fields, part):
  """A mesh or batch that does not fit on 8 devices is refused before any compile."""
  with pytest.raises(ConfigError, match=re.escape(part)):
    config_devices.validate_devices(make(**fields), 8)


def devices(*counts: int) -> list:
  """So many devices of each process."""
  owners = [i for i, count in enumerate(counts) for _ in range(count)]
  return [
    types.SimpleNamespace(process_index=owner, id=n) for n, owner in enumerate(owners)
  ]


@pytest.mark.parametrize(("fields", "part"), DEVICES_REFUSED, ids=lambda x: str(x)[:60])
def test_the_flags_that_an_error_recommends_do_run(fields, part):
  """Each remedy, laid over the config that was refused, is accepted on the devices."""
  config = make(**fields)
  with pytest.raises(ConfigError) as caught:
    config_devices.validate_devices(config, 8)
  _, _, remedy = str(caught.value).rpartition(" Use ")
  for alternative in remedy.split(", or "):
    found = re.findall(r"--config\.([\w.]+)=(\S+?)[.,]?(?=\s|$)", alternative)
    assert found, remedy
    changed = make(**fields)
    for name, text in found:
      config_io.set_field(changed, name, config_io.parse_value(name, text))
    config_check.validate(changed)
    assert config_devices.choose_devices(changed, devices(8))[0]


@pytest.mark.parametrize(
  ("num_devices", "used"),
  [(1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (6, 4), (7, 4), (8, 4)],
)
def test_the_shipped_default_runs_on_any_machine(num_devices, used):
  """16 sequences in 4 groups: the largest divisor of 4 that is there, and it is said."""
  chosen, why = config_devices.choose_devices(default.get_config(), devices(num_devices))
  assert [d.id for d in chosen] == list(range(used))
  assert (why == "") == (used == num_devices)
  if why:
    assert why.startswith(f"Using {used} of {num_devices} devices: --config.")
    assert "\n" not in why


@pytest.mark.parametrize(
  ("counts", "used"),
  [
    ((4, 4), [0, 1, 4, 5]),
    ((2, 2, 2, 2), [0, 2, 4, 6]),
    ((3, 2), [0, 1, 3, 4]),
    ((2, 2), [0, 1, 2, 3]),
  ],
)
def test_each_process_gives_as_many_devices(counts, used):
  """None is without work, and none has more than another."""
  chosen, why = config_devices.choose_devices(default.get_config(), devices(*counts))
  assert [d.id for d in chosen] == used
  assert not why or f"({len(used) // len(counts)} of each process)" in why


def test_a_process_is_never_left_out():
  """Eight processes of one device and four groups: refused, with flags that run."""
  with pytest.raises(ConfigError, match=r"Use --config.moe.group_size=256, or"):
    config_devices.choose_devices(default.get_config(), devices(*[1] * 8))
  config = default.get_config()
  config.moe.group_size = 256
  assert len(config_devices.choose_devices(config, devices(*[1] * 8))[0]) == 8


def test_a_mesh_that_is_given_in_full_is_taken_as_given():
  """Nothing is left out in silence where every axis has its number."""
  with pytest.raises(ConfigError, match=r"Use --config.mesh.data=-1"):
    config_devices.choose_devices(make(mesh__data=4), devices(8))


@pytest.mark.parametrize(
  ("fields", "num_devices"),
  [
    ({}, 1),
    ({}, 16),
    (dict(moe__group_size=-1, moe__exchange="gspmd"), 8),
    (dict(mesh__expert=4), 8),
    (dict(mesh__tensor=4, mesh__fsdp=2), 8),
    (dict(mesh__data=1, mesh__expert=-1), 8),
    (dict(mesh__data=1, mesh__expert=8, moe__num_experts=4, moe__segments=2, **TOP_K), 8),
    (dict(mesh__data=1, mesh__expert=8, moe__num_experts=3, moe__dense_twin=True), 8),
  ],
)
def test_devices_accepted(fields, num_devices):
  config_devices.validate_devices(make(**fields), num_devices)
