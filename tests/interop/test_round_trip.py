"""What is written is what was read: tensors bit for bit, configs field for field."""

import copy as copy_lib
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from moejax.config import Config, text
from moejax.errors import UserError
from moejax.interop import exporting
from moejax.interop.architecture import get
from moejax.interop.canonical import canonical, differences
from moejax.interop.keys import Keys
from moejax.interop.mapping import flatten
from moejax.interop.published import open_folder
from moejax.models.decoder import Decoder
from tests.interop.folders import ARCHITECTURES, copy, golden, opened, split


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_import_then_export_is_bit_identical_on_disk(name, tmp_path):
  """The same tensors of the same names, and a config.json of the same model."""
  published = opened(name)
  params = published.loader.params()
  found, shapes = exporting.export(published.config, published.model, params, tmp_path)
  assert found.name == name
  was = load_file(golden(name) / "model.safetensors")
  now = load_file(tmp_path / "model.safetensors")
  assert set(was) == set(now) == set(shapes)
  for tensor, array in was.items():
    np.testing.assert_array_equal(array, now[tensor], strict=True)
  assert differences(published.config, open_folder(tmp_path).config) == []


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_bfloat16_stays_bfloat16_in_several_files(name, tmp_path, monkeypatch):
  """A sharded bfloat16 model gives bfloat16 parameters and files, bit for bit."""

  def narrow(arrays):
    for tensor in arrays:
      arrays[tensor] = arrays[tensor].astype(ml_dtypes.bfloat16)

  def config(values):
    values["dtype"] = "bfloat16"

  folder = copy(name, tmp_path / "in", config=config, tensors=narrow)
  was = load_file(folder / "model.safetensors")
  split(folder)
  published = open_folder(folder)
  params = published.loader.params()
  assert params["unit"]["0"]["moe"]["experts"]["w_in"].dtype == "bfloat16"
  monkeypatch.setattr(exporting, "SHARD_BYTES", 20_000)
  exporting.export(published.config, published.model, params, tmp_path / "out")
  index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
  files = sorted(set(index["weight_map"].values()))
  assert len(files) > 2 and files[0].endswith(f"-of-{len(files):05d}.safetensors")
  now = {k: v for file in files for k, v in load_file(tmp_path / "out" / file).items()}
  assert set(was) == set(now) == set(index["weight_map"])
  for tensor, array in was.items():
    assert now[tensor].dtype == "bfloat16"
    np.testing.assert_array_equal(array.view(np.uint16), now[tensor].view(np.uint16))


def test_what_bfloat16_cannot_hold_is_written_in_float32(tmp_path):
  """Norms of a trained bfloat16 model have more digits: export then import keeps them."""
  published = opened("mixtral")
  config = copy_lib.deepcopy(published.config)
  config.model.param_dtype = config.model.dtype = "bfloat16"
  model = Decoder(config.model, config.moe, vocab_size=101)
  params = model.init(jax.random.key(0))
  params["embedding"]["norm"]["scale"] = params["embedding"]["norm"]["scale"] * 1.001
  exporting.export(config, model, params, tmp_path / "out")
  back = open_folder(tmp_path / "out").loader.params()
  for name, leaf in flatten(params).items():
    np.testing.assert_array_equal(leaf, flatten(back)[name], strict=True)


def exportable() -> Config:
  """A config of ours, in our own words, that is a Mixtral."""
  config = Config()
  config.model.activation, config.model.tie_embeddings = "swiglu", False
  config.model.vocab_size = 300
  moe = config.moe
  moe.router, moe.num_selected, moe.renormalize = "top_k", 2, "before_drop"
  moe.segments, moe.every, moe.offset = 2, 1, 0
  return config


def test_a_model_of_our_own_finds_its_architecture():
  """Segments are experts, and training options do not matter."""
  config = exportable()
  found, values = exporting.choose(config)
  assert found.name == "mixtral"
  assert (values["num_local_experts"], values["num_experts_per_tok"]) == (16, 4)
  assert values["intermediate_size"] == 256
  config.moe.num_shared, config.moe.shared_gate = 1, True
  config.moe.every, config.moe.offset = 2, 1
  config.model.attention_bias = True
  found, values = exporting.choose(config)
  assert found.name == "qwen2_moe"
  assert values["decoder_sparse_step"] == 2
  assert values["shared_expert_intermediate_size"] == 256
  back = get("qwen2_moe", "").read(Keys({"model_type": "qwen2_moe"} | values, ""))
  assert canonical(back).moe.shared_hidden == 256


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"moe.router": "expert_choice"}, ("--config.moe.router=expert_choice", "top_k")),
    ({"model.activation": "gelu"}, ("--config.model.activation=gelu", "swiglu")),
    ({"moe.eval_capacity_factor": 1.25}, ("eval_capacity_factor=1.25", "none")),
    ({"moe.renormalize_norm": 2.0}, ("renormalize_norm=2.0",)),
    ({"moe.dense_twin": True}, ("dense_twin",)),
    ({"model.logits_soft_cap": 30.0}, ("logits_soft_cap=30.0", "nearest is mixtral")),
  ],
)
def test_a_model_that_transformers_lacks_is_refused_with_the_nearest(change, words):
  """The error names each field that would change, and the architecture it is near."""
  config = exportable()
  for name, value in change.items():
    text.set_field(config, name, value)
  with pytest.raises(UserError) as error:
    exporting.choose(config)
  for word in words:
    assert word in str(error.value), str(error.value)


@pytest.mark.parametrize(
  ("change", "name", "words"),
  [
    ({}, "olmoe", "--architecture=olmoe does not represent this model: --config."),
    (
      {"moe.router": "expert_choice"},
      "mixtral",
      "--config.moe.router=expert_choice would become top_k. Only a model trained with",
    ),
    (
      {},
      "switch_transformers",
      "--architecture=switch_transformers cannot represent this model: "
      "--config.model.kind=decoder, but switch_transformers is an encoder-decoder. Leave "
      "the flag out to see the nearest one.",
    ),
    ({}, "mixtrall", "--architecture=mixtrall is unknown. Did you mean"),
    (
      {"moe.capacity_convention": "slots", "moe.eval_capacity_factor": 4.0},
      "mixtral",
      "--config.moe.eval_capacity_factor=4.0",
    ),
  ],
)
def test_an_architecture_that_was_asked_for_says_why_not(change, name, words):
  """The reason is the fields, the kind of model, or a name that is unknown."""
  config = exportable()
  for field, value in change.items():
    text.set_field(config, field, value)
  with pytest.raises(UserError) as error:
    exporting.choose(config, name)
  assert words in str(error.value), str(error.value)


def test_a_tied_switch_with_two_tables_is_refused():
  """The class has one then; no reason is lost where there is no nearest architecture."""
  config = copy_lib.deepcopy(opened("switch_transformers").config)
  config.model.encoder_embedding = True
  with pytest.raises(UserError, match=r"encoder_embedding=true.*one table"):
    exporting.choose(config, "switch_transformers")


@pytest.mark.parametrize("router", ["group_limited", "sigmoid_bias"])
def test_a_limit_to_all_groups_is_none(router):
  """Groups that are all chosen choose as no group does, and are exported so."""
  config = exportable()
  config.moe.use_router(router, num_expert_groups=1, num_selected_groups=1)
  found, values = exporting.choose(config)
  wanted = {"group_limited": "mixtral", "sigmoid_bias": "glm4_moe"}
  assert found.name == wanted[router]
  assert values.get("n_group", 1) == 1
  config.moe.use_router(router, num_expert_groups=2, num_selected_groups=2)
  assert differences(config, found.read(Keys({"model_type": "x"} | values, ""))) == []


def test_padding_rows_are_not_exported(tmp_path):
  """A vocabulary padded to a multiple of 8 leaves with its own 101 rows."""
  published = opened("mixtral")
  config = copy_lib.deepcopy(published.config)
  config.model.vocab_multiple = 8
  model = Decoder(config.model, config.moe, vocab_size=101)
  params = model.init(jax.random.key(0))
  assert params["embedding"]["table"].shape[0] == 104
  _, shapes = exporting.export(config, model, params, tmp_path / "out")
  assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == (101, 24)
  back = open_folder(tmp_path / "out").loader.params()
  table, head = params["embedding"]["table"][:101], params["embedding"]["head"][:, :101]
  np.testing.assert_array_equal(back["embedding"]["table"], table)
  np.testing.assert_array_equal(back["embedding"]["head"], head)


def test_an_export_into_a_full_folder_is_refused(tmp_path):
  """Nothing of the user's is overwritten."""
  published = opened("mixtral")
  (tmp_path / "mine.txt").write_text("x")
  with pytest.raises(UserError, match="not empty"):
    exporting.export(published.config, published.model, {}, tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_an_export_to_a_file_is_refused(tmp_path):
  """And the file is left alone."""
  published, file = opened("mixtral"), tmp_path / "mine.txt"
  file.write_text("x")
  with pytest.raises(UserError, match=r"--to_hf=.*mine.txt is a file. Give a new folder"):
    exporting.export(published.config, published.model, {}, file)
  assert file.read_text() == "x" and list(tmp_path.iterdir()) == [file]
