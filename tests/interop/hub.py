"""A server of this machine that answers what huggingface_hub asks about one model."""

import contextlib
import hashlib
import http.server
import json
import pathlib
import threading
import urllib.parse
from collections.abc import Iterator

NAME = "org/name"
COMMIT = hashlib.sha1(b"a commit").hexdigest()


@contextlib.contextmanager
def serving(folder: pathlib.Path) -> Iterator[tuple[dict[str, str], list[str]]]:
  """Serves a folder as the model org/name.

  Yields:
    The environment in which huggingface_hub asks here, and the files given out so far.
  """
  names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
  given: list[str] = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
      self.do_GET()

    def do_GET(self) -> None:
      path = urllib.parse.urlparse(self.path).path
      file = path.removeprefix(f"/{NAME}/resolve/{COMMIT}/")
      if path == f"/api/models/{NAME}/revision/main":
        siblings = [{"rfilename": name} for name in names]
        about = {"id": NAME, "sha": COMMIT, "siblings": siblings}
        self.answer(json.dumps(about).encode())
      elif path == f"/api/models/{NAME}/tree/{COMMIT}":  # Asked for by some versions.
        sizes = {name: (folder / name).stat().st_size for name in names}
        tree = [
          {"type": "file", "path": name, "size": size, "oid": COMMIT}
          for name, size in sizes.items()
        ]
        self.answer(json.dumps(tree).encode())
      elif file in names:
        self.answer((folder / file).read_bytes())
        if self.command == "GET":
          given.append(file)
      else:
        self.send_error(404)

    def answer(self, body: bytes) -> None:
      self.send_response(200)
      self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
      self.send_header("X-Repo-Commit", COMMIT)
      self.send_header("Content-Length", str(len(body)))
      self.end_headers()
      if self.command == "GET":
        self.wfile.write(body)

    def log_message(self, format: str, *words: object) -> None:
      del format, words

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
      yield (
        {
          "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
          "HF_HUB_OFFLINE": "0",
          "NO_PROXY": "127.0.0.1",
        },
        given,
      )
    finally:
      server.shutdown()
      thread.join()
