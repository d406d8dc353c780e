"""A notice of preemption: who listens for it, and that no process counts differently."""

import signal

import jax
import pytest
from jax.experimental import multihost_utils

from moejax.launch import preemption
from moejax.run.signals import StopRequest
from moejax.train import loop


@pytest.fixture
def service(monkeypatch):
  """What jax's service was asked with; it says yes at the third call."""
  asked = []

  def reached(number: int) -> bool:
    asked.append(number)
    return number == 3

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", reached)
  return asked


def test_a_single_process_listens_for_itself():
  """No service runs there."""
  assert preemption.notice() is None


def test_without_the_service_processes_agree_as_before(monkeypatch):
  """JAX_ENABLE_PREEMPTION_SERVICE=false makes jax raise."""

  def off(_):
    raise RuntimeError("not initialized")

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", off)
  assert preemption.notice() is None


def test_a_resumed_run_stops_at_any_step_and_not_only_at_logged_ones(
  service, monkeypatch
):
  """The service counts from 0 in each process, and the run from its checkpoint.

  Until it says yes, the processes are not synchronised between logged steps.
  """
  monkeypatch.setattr(
    multihost_utils, "process_allgather", lambda _: pytest.fail("synchronised")
  )
  stop = StopRequest(notice=preemption.notice())
  said = [loop._agreed(stop, step, 1000, is_last=False) for step in (501, 502, 503)]
  assert said == [False, False, True]
  assert service == [0, 1, 2, 3]
  assert stop.exit_code == 143


def test_the_service_s_handler_stays_while_the_run_does(service):
  """Ours would replace it; afterwards SIGTERM ends the process again."""
  before = signal.getsignal(signal.SIGTERM)
  with StopRequest(notice=preemption.notice()) as stop:
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGINT) == stop._handle
  assert signal.getsignal(signal.SIGTERM) is before
