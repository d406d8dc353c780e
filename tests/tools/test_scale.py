"""What a device computes and sends does not grow with the machine."""

import pytest

from tools import scale


def row(devices: int, **changes) -> dict:
  return {
    "devices": devices,
    "flops_per_device": 1e9,
    "all_to_alls": 4,
    "all_to_all_bytes_per_device": 32_768,
    "formula_bytes_per_device": 32_768,
    "unintended": [],
    "compile_seconds": 10.0,
  } | changes


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({}, []),
    ({"flops_per_device": None}, []),
    ({"flops_per_device": 1.02e9, "compile_seconds": 19.0}, []),
    ({"flops_per_device": 1.04e9}, ["FLOPs per device changed by 4.0%"]),
    ({"all_to_all_bytes_per_device": 34_000}, ["3.8% off the formula"]),
    ({"compile_seconds": 20.0}, ["2.0 times the time to compile"]),
    ({"unintended": [{"kind": "all-gather"}]}, ["unintended all-gather"]),
  ],
)
def test_each_bound_is_held(changes, words):
  """3% of FLOPs, 2% of bytes, less than linear time, nothing unintended."""
  found = scale.complaints([row(8), row(16, **changes)])
  assert len(found) == len(words)
  assert all(word in text for word, text in zip(words, found, strict=True))


def test_the_formula_by_hand():
  """A sequence of 256 tokens a device, each to one of E experts: 256 slots of 32 numbers.

  G*E*C*D*4/P with G = E = P = 8 and C = 32; and the same for 256.
  """
  assert scale.bytes_by_formula(8) == 8 * 8 * 32 * 32 * 4 // 8 == 32_768
  assert scale.bytes_by_formula(256) == 32_768


@pytest.mark.parametrize("text", ["8,x", "1,8"])
def test_numbers_that_are_none_are_refused(text, capsys):
  """With the flag named and exit code 2."""
  with pytest.raises(SystemExit) as error:
    scale.main([f"--devices={text}"])
  assert error.value.code == 2 and "--devices" in capsys.readouterr().err


@pytest.mark.slow
def test_twice_the_devices_twice_the_experts(capsys):
  """Compiled for 8 and for 16: the same bytes, by the formula, and two exchanges each
  way for the one MoE layer."""
  assert scale.main(["--devices=8,16"]) == 0
  rows = [line.split() for line in capsys.readouterr().out.splitlines()]
  numbers = {r[0]: r for r in rows if r and r[0] in ("8", "16")}
  for found in numbers.values():
    assert found[3] == "4" and found[4] == found[5] == "32,768"
