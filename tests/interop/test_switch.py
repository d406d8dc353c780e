"""Switch Transformer: an encoder-decoder in and out, and what Transformers computed."""

import dataclasses
from copy import deepcopy as copy_of
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

from moejax.config import MeshConfig
from moejax.data.sentinels import SentinelTokenizer, with_sentinels
from moejax.errors import UserError
from moejax.evaluate import decoding
from moejax.evaluate.sampling import Sampling
from moejax.interop import exporting, importing
from moejax.interop.canonical import differences
from moejax.interop.keys import Keys
from moejax.interop.published import open_folder
from moejax.models.encoder_decoder import EncoderDecoder
from moejax.models.loss import cross_entropy
from moejax.models.placement import param_shardings
from moejax.sharding.mesh import make_mesh
from tests.interop.folders import copy, golden, opened, recorded

NAME = "switch_transformers"


@pytest.fixture(scope="module")
def published():
  return opened(NAME)


@pytest.fixture(scope="module")
def wanted():
  return recorded(NAME)


def logits_of(published: Any, wanted: Any):
  read, ids = (jnp.asarray(wanted[k]) for k in ("input_ids", "decoder_input_ids"))
  run = jax.jit(lambda p: published.model(p, ids, encoder_tokens=read).logits)
  return run(published.loader.params())


def close(logits, wanted):
  np.testing.assert_allclose(np.asarray(logits), wanted, atol=1e-4, rtol=0)


def test_logits_and_loss_are_the_recorded_ones(published, wanted):
  """The loss is of predicting each next token of the decoder, by the logits of both."""
  read, ids = (jnp.asarray(wanted[k]) for k in ("input_ids", "decoder_input_ids"))
  params = published.loader.params()
  logits = jax.jit(lambda p: published.model(p, ids, encoder_tokens=read).logits)(params)
  close(logits, wanted["logits"])
  ours, theirs = (
    jnp.mean(cross_entropy(jnp.asarray(of)[:, :-1], ids[:, 1:]))
    for of in (logits, wanted["logits"])
  )
  assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_with_a_cache_and_unrolled_the_logits_are_the_same(published, wanted):
  """The encoder once, four tokens of the decoder in one call, then one in each."""
  config = dataclasses.replace(published.config.model, scan_layers=False)
  model = EncoderDecoder(config, published.config.moe, vocab_size=config.vocab_size)
  params, ids = published.loader.params(), wanted["decoder_input_ids"]
  read = jnp.asarray(wanted["input_ids"])
  cache = jax.jit(lambda p: model.start(p, read, length=ids.shape[1]))(params)
  step = jax.jit(lambda p, ids, cache: model(p, ids, cache=cache))
  out = step(params, ids[:, :4], cache)
  logits = [out.logits]
  for index in range(4, 7):
    out = step(params, ids[:, index : index + 1], out.cache)
    logits.append(out.logits)
  close(np.concatenate(logits, axis=1), wanted["logits"][:, :7])


def test_on_a_mesh_the_logits_are_the_same(published, wanted):
  """Parameters are read into their shards: five experts do not divide, the width does."""
  mesh = make_mesh(MeshConfig(data=1, fsdp=8))
  params = published.loader.params(param_shardings(published.model, mesh))
  read, ids = (
    jnp.asarray(np.concatenate([wanted[k]] * 4))
    for k in ("input_ids", "decoder_input_ids")
  )
  with jax.set_mesh(mesh):
    logits = jax.jit(lambda p: published.model(p, ids, encoder_tokens=read).logits)(
      params
    )
  close(logits[:2], wanted["logits"])


def test_import_then_export_is_bit_identical_on_disk(published, tmp_path):
  """The same tensors of the same names, and a config.json of the same model."""
  params = published.loader.params()
  found, _ = exporting.export(published.config, published.model, params, tmp_path)
  assert found.name == NAME
  was = load_file(golden(NAME) / "model.safetensors")
  now = load_file(tmp_path / "model.safetensors")
  assert set(was) == set(now)
  for tensor, array in was.items():
    np.testing.assert_array_equal(array, now[tensor], strict=True)
  assert differences(published.config, open_folder(tmp_path).config) == []


@pytest.mark.parametrize(
  ("changes", "what"),
  [
    ({"dense_act_fn": "gelu_new"}, "dense_act_fn='gelu_new'"),
    ({"is_gated_act": True}, "is_gated_act=True"),
    ({"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
    ({"decoder_sparse_step": None, "num_sparse_decoder_layers": 5}, "_layers=5"),
    ({"router_dtype": "bfloat16"}, "router_dtype='bfloat16'"),
    ({"feed_forward_proj": "gated-gelu"}, "feed_forward_proj='gated-gelu'"),
    ({"is_encoder_decoder": False}, "is_encoder_decoder=False"),
    ({"mystery": 1}, "mystery=1"),
  ],
)
def test_what_changes_the_computation_is_refused_by_name(tmp_path, changes, what):
  """Each altered key of config.json is named."""
  folder = copy(NAME, tmp_path / "x", config=lambda values: values.update(changes))
  with pytest.raises(UserError, match=what):
    open_folder(folder)


def test_a_step_wins_over_the_number_of_sparse_layers(published):
  """As in the class; without a step, no sparse layer means the second of the stack."""
  values = dict(published.values)

  def every(**changes):
    keys = Keys(values | changes, "config.json")
    moe = published.architecture.read(keys).moe
    return moe.encoder_every, moe.every

  assert every(num_sparse_encoder_layers=1) == (2, 2)
  assert every(encoder_sparse_step=None, num_sparse_encoder_layers=1) == (4, 2)
  assert every(decoder_sparse_step=None, num_sparse_decoder_layers=0) == (2, 4)


def test_copies_of_the_embedding_are_left_out_by_name(tmp_path):
  """Older folders repeat it under the names of both stacks."""

  def repeat(arrays):
    for stack in ("encoder", "decoder"):
      arrays[f"{stack}.embed_tokens.weight"] = arrays["shared.weight"]

  loader = open_folder(copy(NAME, tmp_path / "x", tensors=repeat)).loader
  assert set(loader.left_out) == {
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
  }


def test_the_tokenizer_has_its_own_sentinels_and_the_decoders_start(tmp_path):
  """`<extra_id_k>` are found by name; the decoder starts with decoder_start_token_id."""
  folder = copy(NAME, tmp_path / "x")
  words = {"<pad>": 0, "<unk>": 1, "</s>": 2, "<extra_id_1>": 7, "<extra_id_0>": 8}
  library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
  (folder / "tokenizer.json").write_text(library.to_str())
  published = open_folder(folder)
  published.config.data.num_sentinels = 2
  assert published.tokenizer is not None
  own = with_sentinels(published.tokenizer, published.config.data)
  assert isinstance(own, SentinelTokenizer)
  assert (own.start, own.separator, own.vocab_size) == (0, 2, 101)
  assert own.sentinels.tolist() == [8, 7]
  published.config.data.num_sentinels = 3  # More than have names: the last ids.
  own = with_sentinels(published.tokenizer, published.config.data)
  assert isinstance(own, SentinelTokenizer)
  assert own.sentinels.tolist() == [100, 99, 98]


def test_the_token_that_begins_a_target_comes_back(tmp_path):
  """With the other ids that an export writes as the import read them."""
  ids = {"decoder_start_token_id": 3, "pad_token_id": 1}
  folder = copy(NAME, tmp_path / "x", config=lambda values: values.update(ids))
  kept = importing.source_digest(open_folder(folder))["kept"]
  assert (kept["decoder_start_token_id"], kept["pad_token_id"]) == (3, 1)


STACKS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def untied(folder, names):
  """Copies the golden with a head and the named tables, all different."""

  def tensors(arrays):
    rng, shape = np.random.default_rng(7), arrays["shared.weight"].shape
    for name in (*STACKS, "lm_head.weight"):
      table = rng.normal(0, 0.3, shape).astype(np.float32)
      if name in names:
        arrays[name] = table

  def config(values):
    values["tie_word_embeddings"] = False

  return copy(NAME, folder, config=config, tensors=tensors)


def exported(published, folder):
  params = published.loader.params()
  exporting.export(published.config, published.model, params, folder)
  return load_file(folder / "model.safetensors")


def test_untied_each_stack_reads_a_table_of_its_own(wanted, tmp_path):
  """Four different tables: the logits of Transformers, which reads `shared` nowhere."""
  folder = untied(tmp_path / "x", (*STACKS, "lm_head.weight"))
  published = open_folder(folder)
  assert list(published.loader.left_out) == ["shared.weight"]
  recorded = np.load(golden(NAME) / "untied.npz")
  close(logits_of(published, wanted), recorded["logits"])
  was = load_file(folder / "model.safetensors")
  now = exported(published, tmp_path / "out")
  was["shared.weight"] = was[STACKS[1]]
  assert set(was) == set(now)
  for name, array in was.items():
    np.testing.assert_array_equal(array, now[name], strict=True)


def test_untied_the_shared_table_serves_stacks_without_one(tmp_path):
  """Earlier versions of Transformers wrote it alone, and always read it."""
  folder = untied(tmp_path / "x", ("lm_head.weight",))
  shared = load_file(folder / "model.safetensors")["shared.weight"]
  now = exported(open_folder(folder), tmp_path / "out")
  for name in (*STACKS, "shared.weight"):
    np.testing.assert_array_equal(now[name], shared)


def test_tied_tables_that_differ_are_refused_by_name(tmp_path):
  """A tied model has one table, whatever the file holds."""

  def differ(arrays):
    arrays[STACKS[0]] = arrays["shared.weight"] + 1

  folder = copy(NAME, tmp_path / "x", tensors=differ)
  with pytest.raises(UserError, match=f"{STACKS[0]}.*tied tables must be the same"):
    open_folder(folder)


def with_slots(tmp_path, slots):
  return copy(
    NAME, tmp_path / "x", config=lambda values: values.update(expert_capacity=slots)
  )


@pytest.mark.parametrize("slots", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_with_few_slots_the_same_tokens_are_dropped(slots, wanted, tmp_path):
  """Per sequence of either stack, in order of arrival: the logits of Transformers."""
  published = open_folder(with_slots(tmp_path, slots))
  recorded = np.load(golden(NAME) / "capacity.npz")
  close(logits_of(published, wanted), recorded[f"slots_{slots}"])


def test_generation_reads_with_few_slots_and_writes_dropless(wanted, tmp_path):
  """As in Transformers: a step of one token overflows no expert. Dropless, both prompts
  are continued otherwise."""
  published = open_folder(with_slots(tmp_path, 3))
  engine = decoding.Engine(published.model, published.loader.params())
  decoded = engine.run(
    [[0], [0]],
    [12, 12],
    how=Sampling.of(0.0, 0, 1.0),
    stop=(),
    allowed=np.ones(101, bool),
    read=np.pad(wanted["input_ids"], ((0, 0), (0, 8)), constant_values=-1),
  )
  recorded = np.load(golden(NAME) / "capacity.npz")["generated_3"]
  assert decoded.tokens == recorded[:, 1:].tolist()


def test_slots_come_back_and_a_dropless_model_stays_one(tmp_path):
  """expert_capacity is exported as it was; none is more than any sequence has."""
  published = open_folder(with_slots(tmp_path, 3))
  assert exporting.choose(published.config)[1]["expert_capacity"] == 3
  published.config.moe.eval_capacity_factor = None
  architecture, values = exporting.choose(published.config)
  assert values["expert_capacity"] == 65_536
  back = architecture.read(Keys(values | {"model_type": NAME}, "config.json"))
  assert back.moe.eval_capacity_factor is None


@pytest.mark.parametrize(
  "changes", [{"overflow": "next_best"}, {"priority": "gate"}, {"group_size": 512}]
)
def test_other_slots_than_the_class_has_are_refused(changes, published):
  """Any slot policy under which other tokens are dropped."""
  config = copy_of(published.config)
  config.moe.eval_capacity_factor = 3.0
  for name, value in changes.items():
    setattr(config.moe, name, value)
  with pytest.raises(UserError, match="eval_capacity_factor=3"):
    exporting.choose(config)


def test_the_dtype_is_that_of_the_weights_where_config_does_not_say(tmp_path):
  """bfloat16 stays, with norms and routers in float32, as in any run."""

  def narrow(arrays):
    for name, array in arrays.items():
      arrays[name] = array.astype(ml_dtypes.bfloat16)

  def config(values):
    del values["dtype"]

  published = open_folder(copy(NAME, tmp_path / "x", config=config, tensors=narrow))
  model = published.config.model
  assert (model.dtype, model.param_dtype) == ("bfloat16", "bfloat16")
  params = published.loader.params()
  assert params["embedding"]["table"].dtype == "bfloat16"
  assert params["encoder"]["norm"]["scale"].dtype == "float32"
  table = params["encoder"]["relative_bias"]["bias"].astype(np.float32)
  wanted = load_file(golden(NAME) / "model.safetensors")
  name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
  np.testing.assert_array_equal(
    table, wanted[name].astype(ml_dtypes.bfloat16).astype(np.float32)
  )
