"""Folders of published models for tests: the goldens, and altered copies of them."""

import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from moejax.interop.published import Published, open_folder

GOLDENS = pathlib.Path(__file__).parents[1] / "golden" / "lm"
"""Tiny models with random weights and logits of Transformers 5.24.0 in float32;
hidden, intermediate and head sizes and the number of experts all differ."""

ARCHITECTURES = (
  "mixtral",
  "olmoe",
  "flex_olmo",
  "qwen2_moe",
  "qwen3_moe",
  "deepseek_v2",
  "deepseek_v3",
  "glm4_moe",
  "gpt_oss",
  "granitemoe",
)


def golden(architecture: str) -> pathlib.Path:
  return GOLDENS / f"{architecture}_a"


def recorded(architecture: str) -> Mapping[str, np.ndarray]:
  return np.load(golden(architecture) / "golden.npz")


def opened(architecture: str) -> Published:
  return open_folder(golden(architecture))


def copy(
  architecture: str,
  folder: pathlib.Path,
  *,
  config: Callable[[dict[str, Any]], None] | None = None,
  tensors: Callable[[dict[str, np.ndarray]], None] | None = None,
) -> pathlib.Path:
  """Copies a golden with changes made in place; returns the folder."""
  source = golden(architecture)
  folder.mkdir(parents=True, exist_ok=True)
  values = json.loads((source / "config.json").read_text())
  if config is not None:
    config(values)
  (folder / "config.json").write_text(json.dumps(values))
  file = folder / "model.safetensors"
  if tensors is None:
    shutil.copyfile(source / "model.safetensors", file)
  else:
    arrays = load_file(source / "model.safetensors")
    tensors(arrays)
    save_file(arrays, file)
  return folder


def split(folder: pathlib.Path, parts: int = 3) -> list[str]:
  """Turns the one file of a folder into several with an index; returns their names."""
  whole = folder / "model.safetensors"
  arrays = load_file(whole)
  names = sorted(arrays)
  files = [f"model-{i + 1:05d}-of-{parts:05d}.safetensors" for i in range(parts)]
  weight_map = {name: files[i * parts // len(names)] for i, name in enumerate(names)}
  for file in files:
    held = {name: arrays[name] for name, at in weight_map.items() if at == file}
    save_file(held, folder / file)
  index = {"metadata": {}, "weight_map": weight_map}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  whole.unlink()
  return files
