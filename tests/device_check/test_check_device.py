"""The device check on CPUs: its table, and that it finds what is wrong.

Here the device is the CPU, so its numbers are right by construction; what is tested is
that each check would notice if they were not.
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.cli import check_device
from moejax.device_check import checks as device_checks
from moejax.device_check import compare as device_compare
from moejax.device_check import layers as device_layers
from moejax.device_check import speed as device_speed
from moejax.device_check.runner import Check, Mismatch, run_check
from moejax.device_check.shapes import Shape
from moejax.dispatch.registry import DISPATCHERS
from moejax.exchange.run import EXCHANGES
from moejax.experts import grouped_matmul as kernels
from moejax.routing.registry import ROUTERS

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_the_whole_table_on_two_fake_devices(tmp_path):
  """Every group has rows, none failed, what is not for CPUs is named, and the file holds
  what the table shows."""
  output = tmp_path / "rows.json"
  command = [sys.executable, "-m", "tools.check_device", "--small"]
  # A busy machine must not cut it short: what it does takes a minute.
  command += ["--minutes=25", f"--output={output}"]
  done = subprocess.run(
    command,
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"},
    timeout=1600,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  rows = json.loads(output.read_text())["rows"]
  assert {row["group"] for row in rows} == {"devices", *check_device.GROUPS}
  by_name = {row["name"]: row for row in rows}
  assert len(by_name) == len(rows)
  for name, row in by_name.items():
    assert row["status"] in ("ok", "not run") and row["detail"], name
    assert name in done.stdout
  for kernel in ("tpu", "tokamax"):
    assert by_name[f"grouped_matmul {kernel} float32"]["status"] == "not run"
  assert by_name["cudnn, window 40 float32"]["status"] == "not run"
  assert by_name["ragged, expert 2, float32"]["numbers"]["error"] < 1e-4
  for shape in ("OLMoE", "Mixtral"):
    numbers = by_name[f"{shape} layer, forward"]["numbers"]
    assert numbers["dropless share"] > 0 and numbers["dropless ms"] > 0
  counts = [sum(row["status"] == s for row in rows) for s in ("ok", "not run")]
  assert f"{counts[0]} ok, 0 failed, {counts[1]} not run" in done.stdout


def names_of(checks) -> str:
  return "\n".join(check.name for check in checks)


def test_everything_that_is_registered_has_a_check():
  """A new kernel, dispatcher, router or exchange is checked without being named again;
  in both dtypes."""
  groups = (
    (kernels.IMPLEMENTATIONS, device_checks.kernel_checks(), "grouped_matmul {}"),
    (DISPATCHERS, device_checks.dispatcher_checks(), "{}"),
    (ROUTERS, device_layers.router_checks(), "{}"),
    (EXCHANGES.keys() - {"none"}, device_layers.exchange_checks(), "{}"),
  )
  for registry, checks, form in groups:
    names = names_of(checks).splitlines()
    for name in registry:
      found = " ".join(n for n in names if n.startswith(form.format(name)))
      assert all(dtype in found for dtype in device_compare.DTYPES), (name, names)


def broken_value(rows, stack, sizes):
  """The first row of every expert's run goes to its neighbour."""
  return jax.lax.ragged_dot(rows, stack, jnp.roll(sizes, 1))


@jax.custom_vjp
def broken_gradient(rows, stack, sizes):
  return jax.lax.ragged_dot(rows, stack, sizes)


def _half(residuals, grad):
  rows, stack, sizes = residuals
  _, pull = jax.vjp(lambda r, s: jax.lax.ragged_dot(r, s, sizes), rows, stack)
  d_rows, d_stack = pull(grad)
  return d_rows, 0.5 * d_stack, None


broken_gradient.defvjp(lambda r, s, n: (jax.lax.ragged_dot(r, s, n), (r, s, n)), _half)


@pytest.mark.parametrize(
  ("broken", "where"), [(broken_value, ""), (broken_gradient, " in d_stack")]
)
def test_a_broken_kernel_is_caught(monkeypatch, broken, where):
  """Wrong values, and right ones with a wrong gradient: in the kernel's own check, by
  name, and in the dispatcher that uses it."""
  monkeypatch.setitem(kernels.IMPLEMENTATIONS, "ragged_dot", broken)
  checks = {c.name: c for c in device_checks.kernel_checks()}
  row = run_check(checks["grouped_matmul ragged_dot float32"])
  assert row.status == "failed" and row.numbers["error"] > 0.1
  assert where in row.detail
  checks = {c.name: c for c in device_checks.dispatcher_checks()}
  row = run_check(checks["grouped (ragged_dot), capacity, float32"])
  assert row.status == "failed" and row.numbers["error"] > 0.1


def test_another_decision_is_caught():
  """One token's expert: an integer that differs, whatever the tolerance. So is NaN, and
  a float32 product that a chip computed at its default precision."""
  check = device_compare.agree
  want = {"expert": np.array([0, 1, 2]), "gate": np.ones(3, np.float32)}
  got = {**want, "expert": np.array([0, 1, 3])}
  with pytest.raises(Mismatch, match="1 of 3 differ in expert"):
    check(got, want, "bfloat16")
  with pytest.raises(Mismatch, match="gate is not finite"):
    check({**want, "gate": np.array([1, np.nan, 1])}, want, "bfloat16")
  with pytest.raises(Mismatch, match="TF32"):
    check({**want, "gate": np.array([1, 1.001, 1], np.float32)}, want, "float32")


@pytest.mark.parametrize("name", list(ROUTERS))
def test_rounding_changes_no_decision_of_the_inputs_chosen(name):
  """A device that adds up in another order moves logits by 1e-6. If that turned a near
  tie, the check would fail on a device that is right: ten times as much turns none."""
  tokens = device_layers.router_inputs()[0]
  noise = np.random.default_rng(1).uniform(-1e-5, 1e-5, tokens.shape)
  for training in (False, True) if ROUTERS[name].needs_key else (False,):
    run, params = device_layers.routed(name, training)
    run = jax.jit(run)
    plain, moved = (
      run(params, at)["placement"] for at in (tokens, tokens + jnp.float32(noise))
    )
    if ROUTERS[name].mixes:  # It decides nothing.
      continue
    for field in ("kept", "expert", "slot", "load"):
      np.testing.assert_array_equal(plain[field], moved[field], err_msg=field)


def test_training_that_goes_astray_is_caught(monkeypatch):
  """A curve that is off by 2% at one step, and one that learns nothing."""
  right = np.linspace(4.0, 1.0, 50)

  def fake(device_losses):
    curves = iter([device_losses, right])
    monkeypatch.setattr(device_layers, "losses_on", lambda *_: next(curves))
    return run_check(
      Check("training", "x", lambda: device_layers.check_training("float32"))
    )

  assert fake(right).status == "ok"
  off = right.copy()
  off[20] *= 1.02
  assert "step 21" in fake(off).detail
  assert fake(np.full(50, np.nan)).detail == "loss is not finite from step 1"
  right = np.full(50, 4.0)
  assert fake(right).detail.endswith("nothing learned")


def test_a_shape_that_does_not_fit_the_memory_becomes_smaller():
  """First fewer tokens, then narrower; with room it stays as published."""
  mixtral = device_speed.SHAPES[1]
  assert device_speed.fit(mixtral, 80 * 2**30) == mixtral
  fewer = device_speed.fit(mixtral, 24 * 2**30)
  assert fewer.T < mixtral.T and fewer.F == mixtral.F
  tiny = device_speed.fit(mixtral, 2**30)
  assert tiny.F < mixtral.F
  assert device_speed.bytes_of(tiny) <= device_speed.MEMORY_SHARE * 2**30


def test_the_share_is_flops_over_time_over_rate():
  """T K D F = 100 * 2 * 10 * 5 is 10,000: 60,000 FLOPs of experts and 8,000 of the
  router, three times that with gradients; in 2 ms at 340 MFLOP/s, 30%."""
  shape = Shape("x", T=100, D=10, F=5, E=4, K=2)
  assert device_speed.flops_of(shape, "forward") == 68_000
  assert device_speed.flops_of(shape, "both") == 204_000
  times = {"dropless": [1e-3, 2e-3, 9e-3], device_speed.PRODUCT: [0.5, 1.0, 3.0]}
  outcome = device_speed.report(shape, 204_000, times, 340e6)
  assert outcome.numbers["dropless share"] == pytest.approx(0.3)
  assert outcome.detail.startswith("dropless 30% (2 ms)")


@pytest.mark.parametrize(
  ("flag", "says"),
  [
    ("--minutes=0", "--minutes=0 must be above 0"),
    ("--output=/nowhere/at/all.json", "make the directory /nowhere/at first"),
    ("--only=kernel", "unknown ['kernel']"),
  ],
)
def test_a_flag_that_makes_no_sense_is_refused(capsys, flag, says):
  """Before any process is started, with exit code 2."""
  with pytest.raises(SystemExit) as error:
    check_device.main([flag])
  assert error.value.code == 2 and says in capsys.readouterr().err
