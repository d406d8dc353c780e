"""A headless Chromium, for tests of pages that `make test-browser` runs."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def launched() -> Iterator[Any]:
  """Yields a browser: chromium on the PATH, or at the path in the variable CHROMIUM."""
  from playwright import sync_api  # pyright: ignore[reportMissingImports]

  path = os.environ.get("CHROMIUM") or shutil.which("chromium")
  assert path, "no Chromium: install it (apt-get install chromium), or set CHROMIUM"
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
    yield browser
    browser.close()


def watched(page: Any, url: str) -> list[str]:
  """Returns a list to which the page's messages, errors and requests will be added."""
  problems: list[str] = []
  page.on("console", lambda m: problems.append(f"console: {m.text}"))
  page.on("pageerror", lambda error: problems.append(f"error: {error}"))

  def request(sent: Any) -> None:
    if sent.url.split("#")[0] != url and not sent.url.startswith(("data:", "blob:")):
      problems.append(f"request: {sent.url}")

  page.on("request", request)
  return problems
