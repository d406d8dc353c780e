"""One-line errors, with a remedy, for requests that a bucket refused.

Three libraries access a bucket (gcsfs for files, TensorStore for arrays, Google's client
for the lease), and each reports the same refusal differently. Only their texts and status
codes are examined, so that a local run imports none of them.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from moejax.errors import UserError
from moejax.storage.paths import RunPath, in_bucket, split

_CREDENTIALS = (
  "Anonymous caller",
  "Anonymous credentials",
  "DefaultCredentialsError",
  "RefreshError",
  "UNAUTHENTICATED",
  "Invalid Credentials",
)
_FORBIDDEN = ("Forbidden", "PERMISSION_DENIED", "does not have storage.")
_BUSY = ("RESOURCE_EXHAUSTED", "TooManyRequests", "rateLimitExceeded", "quota")
_FULL = ("storageQuotaExceeded", "Insufficient Storage", "InsufficientStorage")
_DOWN = (
  "UNAVAILABLE",
  "ServiceUnavailable",
  "ConnectionError",
  "ClientConnectorError",
  "ClientOSError",
  "ServerDisconnectedError",
  "RetryError",
  "Timeout",
  "ProxyError",
  "DEADLINE_EXCEEDED",
  "out of retries",
)


@contextlib.contextmanager
def explained(path: RunPath, flag: str = "--workdir") -> Iterator[None]:
  """Turns a bucket's refusal in the body into a `UserError`; else does nothing.

  Args:
    path: in the bucket; errors for a local path are left as they are.
    flag: the flag that named it. If empty, the bucket is known to exist, and a missing
      file raises FileNotFoundError as usual.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    reason = ""
    if in_bucket(path) and is_theirs(error):
      reason = refusal(error, path) or (_missing(error, path) if flag else "")
    if not reason:
      raise
    named = f"{flag}={path}" if flag else str(path)
    raise UserError(f"{named}: {reason}") from error


def reach(path: RunPath, flag: str = "--workdir") -> None:
  """Checks that the bucket of a path exists and may be listed; skips a local path.

  Raises:
    UserError: it does not exist, or refuses.
  """
  if not in_bucket(path):
    return
  with explained(path, flag):
    # Not through epath, which treats a missing bucket as an empty one.
    from google.cloud import storage

    bucket, name = split(path)
    client = storage.Client(project=None)
    next(iter(client.list_blobs(bucket, prefix=f"{name}/", max_results=1)), None)


def refusal(error: BaseException, path: RunPath) -> str:
  """Returns why a bucket refused, and what to do; empty if it is another error."""
  bucket, _ = split(path)
  code, text = _code(error), _text(error)
  if code == 507 or _has(text, _FULL):
    return (
      f"the bucket {bucket} is full (storage quota). Free some space or ask for more "
      "quota; the same command continues from the newest checkpoint."
    )
  if code == 401 or _has(text, _CREDENTIALS):
    return (
      "there are no valid credentials for Google Cloud. Run `gcloud auth "
      "application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to the key of a "
      "service account."
    )
  if code == 429 or _has(text, _BUSY):
    return (
      f"the bucket {bucket} refuses more requests, even after retries with growing waits "
      "(429: rate or quota). Ask for more quota, or save and log less often; the same "
      "command continues from the newest checkpoint."
    )
  if code == 403 or _has(text, _FORBIDDEN):
    return (
      f"this account may not use the bucket {bucket} in this way (403). It needs to "
      "list, read, write and delete objects: the role roles/storage.objectUser. Is "
      "billing on?"
    )
  if (code is not None and code >= 500) or _has(text, _DOWN):
    return (
      f"the bucket {bucket} does not answer, even after retries with growing waits "
      f"({_short(error)}). Try again later; the same command continues from the newest "
      "checkpoint."
    )
  return ""


def _missing(error: BaseException, path: RunPath) -> str:
  bucket, _ = split(path)
  if _code(error) != 404:
    return ""
  return (
    f"there is no bucket {bucket}. Make it with `gcloud storage buckets create "
    f"gs://{bucket}`, or give another."
  )


def is_theirs(error: BaseException) -> bool:
  """Returns whether an error comes from a library that accesses buckets.

  A word such as "unavailable" alone may also refer to another process of the job.
  """
  chain = _chain(error)
  modules = {type(e).__module__.split(".")[0] for e in chain}
  # gcsfs has no type of its own for 403.
  forbidden = any(isinstance(e, OSError) and "Forbidden: " in str(e) for e in chain)
  return forbidden or bool(modules & {"gcsfs", "aiohttp", "google", "requests"})


def _chain(error: BaseException) -> list[BaseException]:
  found: list[BaseException] = []
  next_one: BaseException | None = error
  while next_one is not None and next_one not in found:
    found.append(next_one)
    next_one = next_one.__cause__ or next_one.__context__
  return found


def _code(error: BaseException) -> int | None:
  for one in _chain(error):
    for name in ("code", "status"):
      code: Any = getattr(one, name, None)
      if isinstance(code, int) and 400 <= code < 600:
        return int(code)
  return None


def _text(error: BaseException) -> str:
  return " ".join(f"{type(e).__name__}: {e}" for e in _chain(error))


def _has(text: str, words: tuple[str, ...]) -> bool:
  return any(word in text for word in words)


def _short(error: BaseException) -> str:
  text = " ".join(f"{type(error).__name__}: {error}".split())
  return text if len(text) <= 120 else text[:117] + "..."
