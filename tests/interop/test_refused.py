"""What cannot be converted is refused by name, before anything is written."""

import json
import shutil
from copy import deepcopy as copy_of

import ml_dtypes
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.interop import importing
from moejax.interop.published import open_folder
from tests.interop.folders import copy, opened, recorded, split


def set_key(name, value):
  return lambda config: config.__setitem__(name, value)


def refused(folder, *words, read=False):
  """Asserts that a folder is refused in one line with these words."""
  with pytest.raises(UserError) as error:
    published = open_folder(folder)
    if read:
      published.loader.params()
  text = str(error.value)
  assert "\n" not in text
  for word in words:
    assert word in text, text


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (set_key("model_type", "mixtrall"), ("mixtrall", "Did you mean mixtral?")),
    (set_key("model_type", "jamba"), ("jamba", "mixtral, olmoe", "kimi_k2")),
    (set_key("model_type", "kimi"), ("Did you mean kimi_k2?",)),
    (lambda c: c.pop("model_type"), ("has no model_type", "kimi_k2")),
    (set_key("partial_rotary_factor", 0.5), ("0.5 has no effect. Remove it",)),
    (
      set_key(
        "rope_parameters",
        {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
      ),
      ("0.5 cannot be combined with 'linear'",),
    ),
    (set_key("hidden_act", "relu"), ("hidden_act='relu'",)),
    (set_key("logit_softcapping", 30.0), ("logit_softcapping=30.0", "not understood")),
    (set_key("hidden_size", "24"), ("hidden_size='24'", "int")),
    (lambda c: c.pop("num_hidden_layers"), ("has no num_hidden_layers",)),
    (set_key("num_hidden_layers", 2), ("model.layers.2.", "not used")),
    (set_key("num_hidden_layers", 4), ("model.layers.3.", "missing")),
    (set_key("intermediate_size", 21), ("w1.weight", "[20, 24]", "[21, 24]")),
    (set_key("vocab_size", 102), ("embed_tokens", "[101, 24]", "[102, 24]")),
    (set_key("dtype", "bfloat16"), ("is F32", "BF16")),
    (set_key("dtype", "int8"), ("dtype='int8'",)),
    (set_key("rope_scaling", {"type": "dynamic", "factor": 2.0}), ("'dynamic'",)),
    (set_key("rope_scaling", {"type": "linear", "factor": 2.0, "x": 1}), ("x is not",)),
    (set_key("quantization_config", {"quant_method": "awq"}), ("awq", "Dequantise")),
    (set_key("num_experts_per_tok", 9), ("num_selected=9", "num_experts=5")),
  ],
)
def test_a_config_that_is_not_understood_is_named(change, words, tmp_path):
  """A key that changes the computation, a wrong size, an unknown architecture."""
  refused(copy("mixtral", tmp_path / "model", config=change), *words)


@pytest.mark.parametrize("layers", [3, 7])
def test_a_model_without_experts_is_refused_without_our_flags(layers, tmp_path):
  """Who imports cannot set --config.moe.*, so the error is about config.json."""
  folder = copy(
    "deepseek_v3", tmp_path / "model", config=set_key("first_k_dense_replace", layers)
  )
  with pytest.raises(UserError, match="no MoE layer.*first_k_dense_replace") as error:
    open_folder(folder)
  assert "--" not in str(error.value)


NAME = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


def spoil(arrays):
  arrays[NAME][0, 1] = np.nan


@pytest.mark.parametrize(
  ("change", "words", "read"),
  [
    (lambda a: a.pop(NAME), (NAME, "missing"), False),
    (lambda a: a.__setitem__("model.more", a[NAME]), ("model.more", "not used"), False),
    (lambda a: a.__setitem__(NAME, a[NAME].T.copy()), (NAME, "[20, 24]"), False),
    (lambda a: a.__setitem__(NAME, a[NAME].astype(np.int32)), (NAME, "I32"), False),
    (lambda a: a.__setitem__(NAME, a[NAME].astype(np.float16)), (NAME, "F16"), False),
    (spoil, (NAME, "not finite"), True),
  ],
)
def test_a_tensor_that_is_wrong_is_named(change, words, read, tmp_path):
  """Missing, surplus, transposed, of another dtype, or with a NaN."""
  refused(copy("mixtral", tmp_path / "model", tensors=change), *words, read=read)


def test_a_folder_that_is_none_says_what_it_holds(tmp_path):
  """Nothing there, no weights, no config, weights of another format."""
  refused(tmp_path / "nowhere", "does not exist")
  (tmp_path / "notes").mkdir()
  (tmp_path / "notes" / "a.txt").write_text("x")
  refused(tmp_path / "notes", "a.txt")
  folder = copy("mixtral", tmp_path / "model")
  (folder / "config.json").unlink()
  refused(folder, "weights but no config.json")
  folder = copy("mixtral", tmp_path / "bin")
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  refused(folder, "no weights", "pytorch_model.bin")
  folder = copy("mixtral", tmp_path / "json")
  (folder / "config.json").write_text("{")
  refused(folder, "config.json cannot be read")


def test_a_shard_that_is_missing_or_cut_short_is_named(tmp_path):
  """The index names a file that is not there, or a file ends too early."""
  folder = copy("mixtral", tmp_path / "missing")
  files = split(folder)
  open_folder(folder)
  (folder / files[1]).unlink()
  refused(folder, files[1], "Copy the missing files")
  folder = copy("mixtral", tmp_path / "short")
  files = split(folder)
  data = (folder / files[2]).read_bytes()
  (folder / files[2]).write_bytes(data[: len(data) - 100])
  refused(folder, files[2], "not a complete safetensors file")
  folder = copy("mixtral", tmp_path / "other")
  files = split(folder)
  shutil.copyfile(folder / files[0], folder / files[1])
  refused(folder, "is in")


def test_experts_swapped_on_disk_change_fingerprints_and_logits(tmp_path):
  """The proof has power: what only swaps two experts of a layer does not pass."""
  import jax

  def swap(arrays):
    for matrix in ("w1", "w2", "w3"):
      prefix = "model.layers.0.block_sparse_moe.experts"
      one, two = f"{prefix}.1.{matrix}.weight", f"{prefix}.4.{matrix}.weight"
      arrays[one], arrays[two] = arrays[two].copy(), arrays[one].copy()

  swapped = open_folder(copy("mixtral", tmp_path / "model", tensors=swap))
  wanted = recorded("mixtral")
  ids = jax.numpy.asarray(wanted["input_ids"])
  logits = jax.jit(lambda p: swapped.model(p, ids).logits)(swapped.loader.params())
  assert np.abs(logits - wanted["logits"]).max() > 0.01


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path):
  """Its ids must have rows in the embedding; a sound one is taken along."""
  from tokenizers import Tokenizer, models

  folder = copy("mixtral", tmp_path / "model")
  for size, good in ((100, True), (300, False)):
    vocabulary = {chr(0x100 + i): i for i in range(size)}
    Tokenizer(models.BPE(vocabulary, [])).save(str(folder / "tokenizer.json"))
    if good:
      tokenizer = open_folder(folder).tokenizer
      assert tokenizer is not None and tokenizer.vocab_size == 101
      assert (tokenizer.separator, tokenizer.start) == (2, 1)
    else:
      refused(folder, "tokenizer.json", "vocabulary of 101")


def test_layers_for_further_tokens_are_left_out_by_name(tmp_path):
  """DeepSeek-V3's multi-token prediction is no part of decoding, and is said."""
  extra = "model.layers.3.eh_proj.weight"

  def more(arrays):
    arrays[extra] = np.ones((24, 48), np.float32)

  folder = copy("deepseek_v3", tmp_path / "model", tensors=more)
  assert "multi-token" in open_folder(folder).loader.left_out[extra]
  folder = copy("mixtral", tmp_path / "none", tensors=more)
  refused(folder, extra)


def test_what_config_json_leaves_open_is_taken_from_the_weights(tmp_path):
  """No dtype: that of the embedding; Kimi K2 is a DeepSeek-V3 by another name."""

  def config(values):
    del values["dtype"]
    values["model_type"] = "kimi_k2"

  def narrow(arrays):
    for name in arrays:
      arrays[name] = arrays[name].astype(ml_dtypes.bfloat16)

  folder = copy("deepseek_v3", tmp_path / "model", config=config, tensors=narrow)
  published = open_folder(folder)
  assert published.architecture.name == "deepseek_v3"
  assert published.config.model.param_dtype == "bfloat16"


def test_a_tied_head_on_disk_must_be_the_embedding(tmp_path):
  """Older models store it twice: the same numbers are left out, others are an error."""
  head = "lm_head.weight"

  def twice(arrays):
    arrays[head] = arrays["model.embed_tokens.weight"].copy()

  def other(arrays):
    twice(arrays)
    arrays[head][100, 23] += 1

  folder = copy("granitemoe", tmp_path / "same", tensors=twice)
  assert "embed_tokens" in open_folder(folder).loader.left_out[head]
  folder = copy("granitemoe", tmp_path / "other", tensors=other)
  refused(folder, head, "different numbers", "tie_word_embeddings")


def test_every_tensor_of_a_golden_has_a_row():
  """The names of the table and those on disk are the same set."""
  published = opened("gpt_oss")
  named = {name for row in published.loader.rows for name, _ in row.tensors()}
  assert named == set(published.loader.source.tensors)
  assert not published.loader.left_out


def test_numbers_of_half_precision_are_widened_exactly(tmp_path):
  """A float16 model is kept in float32, which holds all its numbers."""

  def halve(arrays):
    for name in arrays:
      arrays[name] = arrays[name].astype(np.float16)

  folder = copy(
    "mixtral", tmp_path / "model", config=set_key("dtype", "float16"), tensors=halve
  )
  published = open_folder(folder)
  table = published.loader.params()["embedding"]["table"]
  assert published.config.model.param_dtype == table.dtype == "float32"
  whole = opened("mixtral").loader.params()["embedding"]["table"]
  np.testing.assert_array_equal(table, np.asarray(whole).astype(np.float16))


def test_a_failed_import_leaves_nothing_and_a_finished_one_keeps_its_config(tmp_path):
  """No file of one model is inherited by the next; another option is not ignored."""
  folder, run = copy("mixtral", tmp_path / "bad", tensors=spoil), tmp_path / "run"
  (folder / "tokenizer_config.json").write_text("{}")
  published = open_folder(folder)
  with pytest.raises(UserError, match="not finite"):
    importing.make_run(published, run, published.config)
  assert not run.exists()
  published = opened("mixtral")
  config = copy_of(published.config)
  importing.make_run(published, run, config)
  assert not (run / "tokenizer").exists()
  config.train.batch_size = 3
  with pytest.raises(UserError, match=r"train.batch_size=3"):
    importing.make_run(published, run, config)


def test_a_killed_import_is_resumed_by_its_own_source_only(tmp_path):
  """run.json, written first, names the source."""
  run, published = tmp_path / "run", opened("mixtral")
  run.mkdir()
  origin = importing.source_digest(published)
  (run / "run.json").write_text(json.dumps({importing.SOURCE: origin}))
  other = opened("qwen3_moe")
  with pytest.raises(UserError, match="another model"):
    importing.make_run(other, run, other.config)
  assert importing.make_run(published, run, published.config)


def snapshot(folder):
  """The files below a folder, with their bytes."""
  files = sorted(p for p in folder.rglob("*") if p.is_file())
  return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.mark.parametrize(
  ("model", "run", "words"),
  [
    ("model", "model", "is --from_hf"),
    ("model", "link", "is --from_hf"),
    ("model", "model/run", "is inside --from_hf"),
    ("checkpoints/model", ".", "contains --from_hf"),
    ("model", "other", "holds a published model"),
    ("model", "notes", r"files in checkpoints/ are not a run's"),
    ("model", "words", r"files in tokenizer/ are not a run's"),
  ],
)
def test_no_import_writes_over_a_model_or_removes_others_files(
  model, run, words, tmp_path
):
  """In the source, below it, around it, in another model, among somebody's files.

  The import would fail on a NaN, and a failed one removes what it wrote: not these.
  """
  copy("mixtral", tmp_path / model, tensors=spoil)
  copy("olmoe", tmp_path / "other")
  (tmp_path / "link").symlink_to(tmp_path / model)
  for name in ("notes/checkpoints", "words/tokenizer"):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "mine.txt").write_text("x")
  before = snapshot(tmp_path)
  published = open_folder(tmp_path / model)
  with pytest.raises(UserError, match=words) as error:
    importing.make_run(published, tmp_path / run, published.config)
  assert "\n" not in str(error.value) and "Choose a" in str(error.value)
  assert snapshot(tmp_path) == before and not (tmp_path / model / "run").exists()
