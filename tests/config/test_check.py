"""Every bad configuration is one error that names the flag, its value and a way out."""

import dataclasses
import math

import numpy as np
import pytest

from moejax.config import Config, MoEConfig
from moejax.config import check as config_check
from moejax.config import text as config_text
from moejax.config.check import refuse_unread
from moejax.config.ranges import CHOICES, RANGES
from moejax.dispatch.registry import DISPATCHERS
from moejax.errors import ConfigError
from moejax.options import Range
from moejax.routing import base
from moejax.routing.registry import ROUTERS, options_by_name, readers
from moejax.routing.router import LEARNED_READS, TOKEN_CHOICE_READS


def make(**fields: object) -> Config:
  """A config with fields set by dotted name, a dot written as two underscores."""
  config = Config()
  for name, value in fields.items():
    section, *rest, leaf = name.split("__")
    if rest:  # A router's option.
      config.moe.options.setdefault(rest[0], {})[leaf] = value
      continue
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
  (dict(train__frozen="*[2:1]"), "--config.train.frozen=*[2:1]: '*[2:1]' selects no row"),
  (dict(train__frozen="a[0][1]"), "'a[0][1]' is not a selector"),
  (dict(train__frozen="a,,b"), "'' is not a selector"),
  (dict(data__name="lm1b", data__domains="a"), "a TFDS dataset has no domains"),
  (dict(moe__num_experts=8.0), "--config.moe.num_experts=8.0: expected a whole number"),
  (dict(moe__num_experts=None), "--config.moe.num_experts=none: expected a whole number"),
  (dict(moe__num_experts="4"), "--config.moe.num_experts='4': expected a whole number"),
  (
    dict(moe__num_experts=np.int32(4)),
    "--config.moe.num_experts=np.int32(4): expected a",
  ),
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
  (dict(model__remat="half"), "Choose from none, full, offload, all, dots."),
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
  (dict(moe__renormalize="before_drop"), "leaves the router without a gradient"),
  (dict(moe__renormalize="after_drop", **TOP_K), "leaves the router without a gradient"),
  (dict(moe__num_selected=2), "--config.moe.router=top_k"),
  (dict(moe__segments=2), "--config.moe.segments=2"),
  (dict(moe__router="top2"), "chooses 2 per token"),
  (
    dict(moe__segments=3, **TOP_K),
    "--config.moe.segments=3 with --config.moe.hidden=512",
  ),
  (dict(moe__shared_gate=True), "--config.moe.num_shared=0 means that there are none"),
  (dict(moe__renormalize_norm=2.0), "gates that are not renormalised have no norm"),
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
  dict(moe__router="top2", moe__num_selected=2, moe__top2__second_policy="random"),
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
    name for name, (kind, _) in config_text.field_types().items() if kind in (int, float)
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
    config_text.set_field(config, name, value)
    assert f"--config.{name}=" in refusal(config)
    config_text.set_field(config, name, config_text.parse_value(name, str(value)))
    assert f"--config.{name}=" in refusal(config)


def test_every_word_has_choices_or_is_free():
  """A new enum-like field cannot be forgotten here."""
  free = {"data.name", "data.path", "data.cache_dir", "data.text_field"}
  free |= {"model.window_pattern", "moe.dense_layers", "moe.encoder_router"}
  free |= {"data.domains", "train.init_from", "train.frozen"}
  registered = {"moe.router"}
  words = {name for name, (kind, _) in config_text.field_types().items() if kind is str}
  assert set(CHOICES) == words - free - registered


def test_every_default_is_a_choice_and_in_range():
  config = Config()
  for name, choices in CHOICES.items():
    assert config_text.get_field(config, name) in choices
  for name, allowed in RANGES.items():
    value = config_text.get_field(config, name)
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
  fields = {"moe__num_selected": spec.fixed_selected or 2}
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


@pytest.mark.parametrize("field", sorted((*TOKEN_CHOICE_READS, *LEARNED_READS)))
def test_a_field_is_refused_exactly_where_the_router_does_not_read_it(field):
  """By name, with the routers that do; a config that nobody wrote by hand is let pass."""
  for router in ROUTERS:
    config = make(moe__router=router)
    if ROUTERS[router].reads_field(field):
      refuse_unread(config, [f"moe.{field}"])
      continue
    with pytest.raises(ConfigError) as error:
      refuse_unread(config, ["moe.num_experts", f"moe.{field}"])
    text = str(error.value)
    assert f"--config.moe.{field}=" in text and f"router={router}" in text
    assert all(name in text for name in readers(field))
    config.moe.dense_twin = True
    refuse_unread(config, [f"moe.{field}"])
  assert 0 < len(readers(field)) < len(ROUTERS)


def test_an_option_is_refused_under_every_other_router():
  """One router each; the twin keeps those of the config it is twin to."""
  names = [f"{r}.{o}" for r in ROUTERS for o in options_by_name(r)]
  assert len(names) > 15
  for router in ROUTERS:
    config = make(moe__router=router)
    for name in names:
      if name.startswith(f"{router}."):
        refuse_unread(config, [f"moe.{name}"])
        continue
      with pytest.raises(ConfigError, match=f"router={name.partition('.')[0]}"):
        refuse_unread(config, [f"moe.{name}"])


def test_every_field_that_only_some_routers_read_is_one():
  """A slip in these names would refuse nothing."""
  known = {field.name for field in dataclasses.fields(MoEConfig)}
  assert {*TOKEN_CHOICE_READS, *LEARNED_READS} <= known
  for router in ROUTERS.values():
    assert set(router.reads) <= set(TOKEN_CHOICE_READS)


@pytest.mark.parametrize(
  ("fields", "part"),
  [
    (dict(moe__group_limited__num_expert_groups=3), "does not divide the 8 experts"),
    (
      dict(
        moe__group_limited__num_expert_groups=4, moe__group_limited__num_selected_groups=5
      ),
      "not in 1..4",
    ),
    (
      dict(
        moe__group_limited__num_expert_groups=4,
        moe__group_limited__num_selected_groups=1,
        moe__num_selected=3,
      ),
      "more than the 2 experts",
    ),
    (
      dict(moe__group_limited__num_expert_groups=4, moe__group_limited__group_best=3),
      "group_best=3",
    ),
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
  assert "has no effect with --config.moe.capacity_factor=none" in refusal(config)


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
