"""All checks of a device, in the order in which they run."""

import sys

import jax

from moejax.device_check import checks, layers, speed
from moejax.device_check.runner import Check, Outcome
from moejax.launch import host_memory


def check_devices() -> Outcome:
  """Returns the devices that were found: not a check, but the head of the table."""
  found = jax.devices()
  kind = f"{len(found)} x {found[0].platform} {found[0].device_kind}"
  python = ".".join(map(str, sys.version_info[:3]))
  return Outcome(f"{kind}; jax {jax.__version__}, Python {python}")


def make_checks(options: checks.Options) -> list[Check]:
  """Returns the selected checks, simple ones first."""
  # As in training; it must precede the first computation.
  host_memory.keep_freed_pages()
  found = [
    *checks.kernel_checks(),
    *checks.dispatcher_checks(),
    *checks.attention_checks(),
    *layers.router_checks(),
    *layers.exchange_checks(),
    *layers.training_checks(),
    *speed.speed_checks(options),
  ]
  if options.small:
    found = [check for check in found if check.basic]
  if options.only:
    found = [check for check in found if check.group in options.only]
  return [Check("devices", "found", check_devices), *found]
