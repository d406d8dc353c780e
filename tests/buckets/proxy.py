"""A proxy before the emulator that injects faults: what a service far away does."""

import contextlib
import dataclasses
import http.client
import http.server
import random
import threading
import time
import urllib.parse
from collections.abc import Iterator

_DROPPED = {"connection", "content-length", "transfer-encoding", "host"}
_HALF = 2


@dataclasses.dataclass
class Faults:
  """Fractions of the requests that meet each fault; changed while the proxy runs."""

  refused: float = 0.0
  """Answered by one of `codes`, and not passed on."""
  codes: tuple[int, ...] = (429, 500, 503)
  full: int = 0
  """Code by which everything that would write is refused; 0 is none."""
  lost: float = 0.0
  """Passed on, and the connection closed in place of an answer."""
  lost_deletes: int = 0
  """How many of the next removals are passed on without an answer."""
  cut: float = 0.0
  """Answered with half of the body."""
  latency: float = 0.0
  """Most seconds by which an answer is late."""
  seed: int = 0
  first: list[str] = dataclasses.field(default_factory=list)
  """Faults that the next requests meet, whatever the fractions."""
  met: dict[str, int] = dataclasses.field(default_factory=dict)
  """How often each fault was met."""

  def __post_init__(self):
    self._random, self._lock = random.Random(self.seed), threading.Lock()

  def draw(self) -> tuple[str, float, int]:
    """Returns the fault of a request, its delay and, if refused, its code."""
    with self._lock:
      at, code = self._random.random(), self._random.choice(self.codes)
      delay = self.latency * self._random.random()
      fault = self.first.pop(0) if self.first else ""
      if fault:
        self.met[fault] = self.met.get(fault, 0) + 1
        return fault, delay, code
      for name in ("refused", "lost", "cut"):
        if not fault and at < getattr(self, name):
          fault = name
          self.met[name] = self.met.get(name, 0) + 1
        at -= getattr(self, name)
      return fault, delay, code


@contextlib.contextmanager
def started(target: str, faults: Faults) -> Iterator[str]:
  """Starts a proxy of an emulator; yields its URL."""
  place = urllib.parse.urlsplit(target).netloc
  finished: dict[str, tuple] = {}
  """Answers that ended an upload session: the service repeats them, the emulator does
  not know the session any more."""

  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
      pass

    def _answer(self):
      body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
      if self.headers.get("Transfer-Encoding") == "chunked":
        body = b"".join(_chunks(self.rfile))
      fault, delay, code = faults.draw()
      if faults.full and self.command in ("POST", "PUT", "PATCH"):
        fault, code = "refused", faults.full
      if faults.lost_deletes and self.command == "DELETE":
        faults.lost_deletes -= 1
        faults.met["lost"] = faults.met.get("lost", 0) + 1
        fault = "lost"
      time.sleep(delay)
      if fault == "refused":
        return self._send(code, [], b'{"error": {"code": %d, "message": "x"}}' % code)
      answer = finished.get(self.path) or self._forward(body)
      status, headers, content = answer
      if fault and "upload_id=" in self.path:
        finished[self.path] = answer
      if fault == "lost":
        self.close_connection = True
        return None
      return self._send(status, headers, content, cut=fault == "cut")

    def _forward(self, body):
      link = http.client.HTTPConnection(place, timeout=60)
      sent = {k: v for k, v in self.headers.items() if k.lower() not in _DROPPED}
      link.request(self.command, self.path, body or None, sent | {"Host": place})
      answer = link.getresponse()
      content, headers = answer.read(), answer.getheaders()
      link.close()
      here = self.headers["Host"]
      if answer.headers.get_content_type() == "application/json":
        content = content.replace(place.encode(), here.encode())
      return answer.status, [(k, v.replace(place, here)) for k, v in headers], content

    def _send(self, status, headers, content, *, cut=False):
      self.send_response(status)
      for name, value in headers:
        if name.lower() not in _DROPPED:
          self.send_header(name, value)
      self.send_header("Content-Length", str(len(content)))
      self.end_headers()
      if cut and len(content) >= _HALF:
        content = content[: len(content) // _HALF]
        self.close_connection = True
      if self.command != "HEAD":
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _answer

  class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
      pass  # a client that has given up

  with Server(("127.0.0.1", 0), Handler) as server:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()


def _chunks(stream) -> Iterator[bytes]:
  while size := int(stream.readline().split(b";")[0], 16):
    yield stream.read(size)
    stream.readline()
  stream.readline()
