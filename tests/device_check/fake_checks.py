"""Checks that misbehave, importable by the process that runs them."""

import os
import time

from moejax.device_check.runner import Check, Mismatch, Outcome


def fine() -> Outcome:
  return Outcome(f"process {os.getpid()}", {"error": 0.0})


def wrong() -> Outcome:
  raise Mismatch("error 1.0 (at most 0.1)", error=1.0)


def raising() -> Outcome:
  raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS\nand a page of more")


def dying() -> Outcome:
  os.abort()


def hanging() -> Outcome:
  time.sleep(600)
  raise AssertionError


def make_checks(names: tuple[str, ...]) -> list[Check]:
  """One check for each name of a function here, or of a reason not to run."""
  known = {f.__name__: f for f in (fine, wrong, raising, dying, hanging)}
  return [
    Check("fakes", name, known.get(name, fine), "" if name in known else name)
    for name in names
  ]


def refuse(names: tuple[str, ...]) -> list[Check]:
  raise RuntimeError(f"no device for {len(names)} checks")
