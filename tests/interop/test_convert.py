"""The program `convert`, and runs that it makes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from moejax import load_run
from moejax.checkpoint import lazy
from moejax.checkpoint.manager import restore_params
from moejax.cli import convert as program
from moejax.cli import flags, restored
from moejax.config import MeshConfig
from moejax.data.tokenizer import load_tokenizer
from moejax.errors import UserError
from moejax.interop import importing
from moejax.interop.mapping import flatten
from moejax.interop.published import open_folder
from moejax.models.placement import param_shardings
from moejax.sharding.mesh import make_mesh
from tests.interop import hub
from tests.interop.folders import copy, golden, opened, recorded

ROOT = Path(__file__).parents[2]


def convert(
  *arguments: str,
  program: str = "convert",
  cwd: Path = ROOT,
  environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
  command = [sys.executable, "-m", f"moejax.cli.{program}", *arguments]
  return subprocess.run(
    command,
    capture_output=True,
    text=True,
    cwd=cwd,
    timeout=300,
    env=os.environ | (environment or {}),
  )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
  workdir = tmp_path_factory.mktemp("convert") / "run"
  published = opened("gpt_oss")
  importing.make_run(published, workdir, published.config)
  return workdir


def test_a_converted_run_loads_by_its_directory_alone(run):
  """load_run gives the recorded logits, without a tokenizer, and the exact arrays."""
  loaded, wanted = load_run(run), recorded("gpt_oss")
  assert loaded.tokenizer is None
  logits = loaded.logits(wanted["input_ids"])
  np.testing.assert_allclose(logits, wanted["logits"], atol=1e-4, rtol=0)
  whole = flatten(opened("gpt_oss").loader.params())
  for name, leaf in flatten(loaded.params).items():
    np.testing.assert_array_equal(leaf, whole[name], strict=True)


def test_a_run_without_a_tokenizer_reads_no_text_and_says_so(run, tmp_path):
  """One line, before the dataset is looked at; not for a tokenizer that needs no file."""
  with pytest.raises(UserError, match="has no tokenizer.*with a tokenizer.json") as error:
    restored.check_tokenizer("hf", run)
  assert "\n" not in str(error.value) and error.value.exit_code == 2
  restored.check_tokenizer("bytes", run)
  (tmp_path / "tokenizer").mkdir()
  (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
  restored.check_tokenizer("hf", tmp_path)


def test_a_converted_run_restores_onto_a_mesh(run):
  """Its checkpoint is one like any other, read into any shards."""
  published = opened("gpt_oss")
  mesh = make_mesh(MeshConfig(data=1, expert=3, fsdp=2), devices=jax.devices()[:6])
  shardings = param_shardings(published.model, mesh)
  params, _, _ = restore_params(run, shardings=shardings)
  experts = flatten(params)["unit.0.moe.experts.w_in"]
  assert experts.addressable_shards[0].data.shape == (4, 3, 12, 14)
  whole = flatten(published.loader.params())["unit.0.moe.experts.w_in"]
  np.testing.assert_array_equal(experts, whole)


def test_reading_into_shards_first_writes_the_same_checkpoint(run, tmp_path):
  """With a mesh the arrays pass through devices; fingerprints stay what they were."""
  published = opened("gpt_oss")
  mesh = make_mesh(MeshConfig(data=1, expert=3, fsdp=2), devices=jax.devices()[:6])
  shardings = param_shardings(published.model, mesh)
  sums = importing.make_run(published, tmp_path, published.config, shardings)
  meta = importing.converted(run)
  assert meta is not None and sums == importing.sums(meta["leaves"])


def test_large_arrays_are_written_in_parts(monkeypatch, tmp_path):
  """Chunks of single experts hold the same numbers, and no part is a whole array."""
  monkeypatch.setattr(lazy, "_CHUNK_BYTES", 2_000)
  read = []
  whole = lazy.LazyArray.part

  def part(self, index):
    result = whole(self, index)
    read.append(result.nbytes)
    return result

  monkeypatch.setattr(lazy.LazyArray, "part", part)
  published = opened("mixtral")
  sums = importing.make_run(published, tmp_path, published.config)
  assert max(read) <= 24 * 101 * 4
  params, _, _ = restore_params(tmp_path)
  for name, leaf in flatten(published.loader.params()).items():
    np.testing.assert_array_equal(flatten(params)[name], leaf, strict=True)
  monkeypatch.undo()
  other = tmp_path / "other"
  assert sums == importing.make_run(published, other, published.config)


def test_a_conversion_that_fails_leaves_no_run(tmp_path):
  """A NaN found while writing: nothing looks whole, and the same command can follow."""

  def spoil(arrays):
    arrays["model.norm.weight"][3] = np.inf

  folder, workdir = copy("mixtral", tmp_path / "model", tensors=spoil), tmp_path / "run"
  published = open_folder(folder)
  with pytest.raises(UserError, match="model.norm.weight has numbers"):
    importing.make_run(published, workdir, published.config)
  with pytest.raises(UserError, match="is not a directory"):
    load_run(workdir)
  assert not workdir.exists()
  copy("mixtral", folder)
  published = open_folder(folder)
  sums = importing.make_run(published, workdir, published.config)
  # Once more is no work, and another model is refused.
  assert importing.make_run(published, workdir, published.config) == sums
  other = opened("qwen3_moe")
  with pytest.raises(UserError, match="holds a conversion of"):
    importing.make_run(other, workdir, other.config)


def test_the_program_converts_there_and_back(tmp_path):
  """It prints architecture, counts and fingerprints; the other programs take the run."""
  source, run, back = golden("mixtral"), tmp_path / "run", tmp_path / "back"
  done = convert(f"--from_hf={source}", "--workdir=run", cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert "mixtral: 31,584 parameters, 18,624 active, in float32" in done.stdout
  prints = re.findall(r"^(unit\.0\.moe\.experts\.\w+)  [0-9a-f]{16}$", done.stdout, re.M)
  assert len(prints) == 3
  assert "no tokenizer.json" in done.stdout
  done = convert(f"--workdir={run}", "--prompt=x", program="generate")
  assert done.returncode == 2 and "holds no readable tokenizer" in done.stderr
  done = convert(f"--workdir={source}", "--prompt=x", program="generate")
  assert done.returncode == 2 and f"--from_hf={source} --workdir=RUN" in done.stderr
  done = convert(f"--workdir={run}", f"--to_hf={back}")
  assert done.returncode == 0, done.stderr
  same = (back / "model.safetensors").read_bytes()
  assert same == (source / "model.safetensors").read_bytes()
  config = json.loads((back / "config.json").read_text())
  assert (config["eos_token_id"], config["architectures"]) == (2, ["MixtralForCausalLM"])


@pytest.mark.parametrize(
  ("field", "value"),
  [("moe.router", "expert_choice"), ("moe.num_selected", 99), ("model.num_heads", 0)],
)
def test_another_model_is_refused_before_it_is_checked(run, monkeypatch, field, value):
  """No advice on how to complete a model that would not be exported or imported."""
  monkeypatch.setattr(flags, "_overrides", {field: value})
  words = f"--config.{field}: the stored model fixes this field"
  with pytest.raises(UserError, match=words):
    program.export(run, run.parent / "out")
  with pytest.raises(UserError, match=words):
    program.import_(str(golden("gpt_oss")), str(run.parent / "new"))


def test_a_field_of_the_conversion_is_still_checked(run, monkeypatch):
  """What is wrong with it is said, not that it belongs to the model."""
  monkeypatch.setattr(flags, "_overrides", {"train.batch_size": 0})
  with pytest.raises(UserError, match=r"train\.batch_size=0"):
    program.export(run, run.parent / "out")


def test_a_dry_run_prints_each_tensor_and_writes_nothing(tmp_path):
  """Names, shapes and the place of every tensor on disk."""
  done = convert(f"--from_hf={golden('mixtral')}", "--dry_run")
  assert done.returncode == 0, done.stderr
  line = (
    "model.layers.2.block_sparse_moe.experts.4.w2.weight [24, 20] -> "
    "unit.0.moe.experts.w_out[2] expert 4 [20, 24]"
  )
  assert line in done.stdout.splitlines()
  assert len(re.findall("^model.layers.*->", done.stdout, re.M)) == 3 * (3 * 5 + 7)


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ((), "either --from_hf=DIR"),
    (("--from_hf=x",), "--workdir=DIR is missing"),
    (("--from_hf=x", "--workdir=y", "--step=3"), "belong to --to_hf"),
    (("--from_hf=nowhere", "--workdir=y"), "does not exist"),
    (
      (f"--from_hf={golden('mixtral')}", "--dry_run", "--config.moe.num_selected=3"),
      "--config.moe.num_selected",
    ),
    ((f"--workdir={ROOT}/docs", f"--to_hf={ROOT}/docs/../docs/x"), "which is only read"),
  ],
)
def test_what_makes_no_sense_is_one_line(arguments, words):
  """Exit code 2, one line on stderr."""
  done = convert(*arguments)
  assert done.returncode == 2
  assert words in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_model_is_downloaded_by_its_name(tmp_path):
  """From the command line to the run; no README, and no other format's weights."""
  source, run = tmp_path / "model", tmp_path / "run"
  shutil.copytree(golden("mixtral"), source)
  (source / "README.md").write_text("x")
  (source / "original").mkdir()
  (source / "original" / "model.safetensors").write_text("the same, for others")
  with hub.serving(source) as (environment, given):
    environment["HF_HOME"] = str(tmp_path / "hub")
    done = convert(
      f"--from_hf=hf://{hub.NAME}", f"--workdir={run}", environment=environment
    )
  assert done.returncode == 0, done.stderr
  assert sorted(given) == ["config.json", "model.safetensors"]
  assert importing.converted(run)


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("hf://org/name", "cannot be downloaded"),
    ("gs://bucket/model", "must be a path on a disk of this machine"),
  ],
)
def test_what_is_not_here_is_one_line(name, words, tmp_path):
  """A model that is neither stored nor reachable, and one in a bucket."""
  where = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
  done = convert(f"--from_hf={name}", f"--workdir={tmp_path / 'run'}", environment=where)
  assert done.returncode == 2 and not (tmp_path / "run").exists()
  assert done.stderr.startswith(f"error: --from_hf={name}") and words in done.stderr
  assert len(done.stderr.splitlines()) == 1


def test_the_tokenizer_goes_in_and_out(tmp_path):
  """Encoded as by the library, decoded to its bytes, and written as it was."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers

  def config(values):
    values["vocab_size"] = 300

  def tensors(arrays):
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
      arrays[name] = np.zeros((300, 24), np.float32)

  folder = copy("mixtral", tmp_path / "model", config=config, tensors=tensors)
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {letter: i for i, letter in enumerate(letters)} | {"th": 256}
  made = Tokenizer(models.BPE(vocabulary, [("t", "h")]))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens(["<s>"])
  made.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text('{"kept": 1}')
  published = open_folder(folder)
  importing.make_run(published, tmp_path / "run", published.config)
  tokenizer = load_tokenizer(tmp_path / "run")
  text = "the path, \u00e4"
  assert tokenizer.encode(text) == made.encode(text, add_special_tokens=False).ids
  assert tokenizer.decode(tokenizer.encode(text)) == text
  assert tokenizer.bytes_per_token[256] == 2 and tokenizer.bytes_per_token[257] == 0
  done = convert(f"--workdir={tmp_path / 'run'}", f"--to_hf={tmp_path / 'back'}")
  assert done.returncode == 0, done.stderr
  written = Tokenizer.from_file(str(tmp_path / "back" / "tokenizer.json"))
  assert written.to_str() == made.to_str()
  assert (tmp_path / "back" / "tokenizer_config.json").read_text() == '{"kept": 1}'


def fp8(arrays):
  """Stores one matrix in 8 bits with a factor for each block of 8 x 16."""
  name = "model.layers.1.self_attn.o_proj.weight"
  scale = np.arange(1, 10, dtype=np.float32).reshape(3, 3) / 4
  arrays[name] = (arrays[name] * 4).astype(ml_dtypes.float8_e4m3fn)
  arrays[f"{name}_scale_inv"] = scale


def test_eight_bit_blocks_are_multiplied_by_their_factors(tmp_path):
  """DeepSeek-V3's format: w = x * scale, block by block, the last ones cut."""
  from safetensors.numpy import load_file, save_file

  folder = copy("deepseek_v3", tmp_path / "model")
  arrays = load_file(folder / "model.safetensors")
  narrow = {n: a.astype(ml_dtypes.bfloat16) for n, a in arrays.items()}
  fp8(narrow)
  # The library's numpy writer knows no 8-bit floats: bytes, under the right name.
  name = "model.layers.1.self_attn.o_proj.weight"
  bits, narrow[name] = narrow[name], narrow[name].view(np.int8)
  save_file(narrow, folder / "model.safetensors")
  file = folder / "model.safetensors"
  data = file.read_bytes()
  size = int.from_bytes(data[:8], "little")
  header = json.loads(data[8 : 8 + size])
  header[name]["dtype"] = "F8_E4M3"
  text = json.dumps(header, separators=(",", ":")).encode()
  file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
  values = json.loads((folder / "config.json").read_text())
  values["dtype"] = "bfloat16"
  values["quantization_config"] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [8, 16],
  }
  (folder / "config.json").write_text(json.dumps(values))
  source = open_folder(folder).loader.source
  found = source.read(name)
  wanted = bits.astype(np.float32)
  for i in range(wanted.shape[0]):
    for j in range(wanted.shape[1]):
      wanted[i, j] *= narrow[f"{name}_scale_inv"][i // 8, j // 16]
  assert found.dtype == "bfloat16"
  np.testing.assert_array_equal(found, wanted.astype(ml_dtypes.bfloat16))


def test_four_bit_blocks_are_values_times_powers_of_two():
  """GPT-OSS's format, by hand: the low half of a byte first, scale 2^(s - 127)."""
  from moejax.interop.quantised import Mxfp4

  blocks = np.zeros((1, 2, 1, 16), np.uint8)
  blocks[0, 0, 0, 0] = 0x21  # 0.5, then 1.0
  blocks[0, 1, 0, 15] = 0xF7  # 6.0, then -6.0
  scales = np.array([[[128], [126]]], np.uint8)
  packing = Mxfp4()
  assert packing.shape(blocks.shape, scales.shape) == (1, 32, 2)
  tensor = packing.unpack(blocks, scales)
  assert tensor.shape == (1, 32, 2) and tensor.dtype == "bfloat16"
  assert [float(v) for v in tensor[0, :2, 0]] == [1.0, 2.0]
  assert [float(v) for v in tensor[0, 30:, 1]] == [3.0, -3.0]
  assert np.count_nonzero(tensor) == 4
  np.testing.assert_array_equal(packing.unpack(blocks[0], scales[0]), tensor[0])


def test_a_model_in_four_bits_is_imported_whole(tmp_path):
  """Blocks and scales of all experts and layers become matrices in bfloat16, in place."""
  from safetensors.numpy import load_file, save_file

  from moejax.interop import exporting
  from moejax.models.decoder import Decoder

  config = opened("gpt_oss").config
  config.model.width, config.model.num_heads, config.model.num_kv_heads = 64, 4, 2
  config.moe.hidden, config.moe.num_experts = 96, 5
  config.model.param_dtype = config.model.dtype = "bfloat16"
  model = Decoder(config.model, config.moe, vocab_size=101)
  folder = tmp_path / "model"
  exporting.export(config, model, model.init(jax.random.key(0)), folder)
  arrays = load_file(folder / "model.safetensors")
  rng, packed = np.random.default_rng(0), {}
  for name in list(arrays):
    if name.endswith(("gate_up_proj", "down_proj")):
      experts, inputs, outputs = arrays.pop(name).shape
      shape = (experts, outputs, inputs // 32)
      blocks = rng.integers(0, 256, (*shape, 16), np.uint8)
      scales = rng.integers(120, 130, shape, np.uint8)
      packed[name] = (blocks, scales)
      arrays[f"{name}_blocks"], arrays[f"{name}_scales"] = blocks, scales
  save_file(arrays, folder / "model.safetensors")
  values = json.loads((folder / "config.json").read_text())
  values["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
  (folder / "config.json").write_text(json.dumps(values))
  params = flatten(open_folder(folder).loader.params())
  numbers = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
  blocks, scales = packed["model.layers.3.mlp.experts.gate_up_proj"]
  # Input 38 of the 70th output (the gate of hidden unit 35) of expert 4: block 1, byte 3.
  for output, ours in ((70, "w_gate"), (71, "w_in")):
    code = int(blocks[4, output, 1, 3]) & 15
    wanted = numbers[code & 7] * (-1 if code & 8 else 1)
    wanted *= 2.0 ** (int(scales[4, output, 1]) - 127)
    assert float(params[f"unit.0.moe.experts.{ours}"][3, 4, 38, 35]) == wanted
  blocks, scales = packed["model.layers.0.mlp.experts.down_proj"]
  code = int(blocks[2, 9, 1, 15]) >> 4
  wanted = numbers[code & 7] * (-1 if code & 8 else 1)
  wanted *= 2.0 ** (int(scales[2, 9, 1]) - 127)
  assert float(params["unit.0.moe.experts.w_out"][0, 2, 63, 9]) == wanted
