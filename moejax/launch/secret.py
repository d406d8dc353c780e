"""A job's secret, which distinguishes its processes from strangers at the port.

It comes from the environment or a file, never from a flag, which every user of a machine
can read in its process list. It is never sent: both sides prove that they have it, and
sign every later line, by HMACs under keys derived from it and two fresh random numbers.
"""

import hashlib
import hmac
import os
import pathlib

from moejax.errors import UserError

ENV = "MOEJAX_JOB_SECRET"
FILE_ENV = "MOEJAX_JOB_SECRET_FILE"

_LEAST = 16
_MOST = 4096
_REMEDY = (
  "Make one with `openssl rand -hex 32`, and give it only to the processes of this job."
)


def job_secret() -> bytes | None:
  """Returns the secret that this process was given; None if none.

  Raises:
    UserError: given twice, too short or too long, or its file cannot be read. The error
      does not repeat the secret.
  """
  text, file = os.environ.get(ENV, ""), os.environ.get(FILE_ENV, "")
  if not text and not file:
    return None
  if text and file:
    raise UserError(f"{ENV} and {FILE_ENV} exclude each other: give one.")
  if file:
    try:
      with open(pathlib.Path(file).expanduser(), "rb") as opened:
        secret = opened.read(_MOST + 1).strip()
    except OSError as error:
      raise UserError(
        f"{FILE_ENV}={file} cannot be read ({error.strerror}). {_REMEDY}"
      ) from error
  else:
    secret = os.fsencode(text.strip())
  if not _LEAST <= len(secret) <= _MOST:
    where = f"{FILE_ENV}={file}" if file else ENV
    raise UserError(
      f"{where} has {len(secret)} characters, not {_LEAST} to {_MOST}. {_REMEDY}"
    )
  return secret


def session_key(secret: bytes, of_caller: str, of_host: str) -> bytes:
  """Returns a connection's key, from the secret and both sides' random numbers."""
  return code(secret, f"moejax meeting\0{of_caller}\0{of_host}".encode())


def code(key: bytes, message: bytes) -> bytes:
  """Returns the HMAC-SHA256 of a message."""
  return hmac.new(key, message, hashlib.sha256).digest()
