"""Tokenizers: text to ids and back, lossless for any bytes.

bytes  one id per byte, and the separator; no training, no unknown tokens.
bpe    byte-level byte pair encoding (Sennrich et al., arXiv:1508.07909; on bytes as
       in GPT-2), trained with the `tokenizers` library on the train split.
hf     imported with a published model; any kind that the `tokenizers` library supports.

Every token stands for a known number of bytes, so bits per byte is exact for any
set of tokens: see `bytes_per_token`.

No text encodes to the separator. It is therefore not a special token of the library,
which would find it inside documents.
"""

import abc
import functools
import json
import re
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from jaxtyping import Int, Integer
from tokenizers import decoders, models, pre_tokenizers, trainers

from moejax import files
from moejax.data import cache
from moejax.errors import ConfigError, UserError, did_you_mean
from moejax.storage.paths import RunPath, make_directory, run_path

TOKENIZERS = ("bytes", "bpe", "hf")

FILE = "tokenizer/tokenizer.json"
"""Path inside a run's directory."""

Ids = Iterable[int] | Integer[np.ndarray, "..."]
"""Token ids as input: a list or an array of any shape."""

_BYTES_VOCAB = 264
"""256 bytes and the separator, rounded up to a multiple of 8 devices."""

_MIN_BPE_VOCAB = 257
_MAX_VOCAB = 2**24
_MAX_BYTES = 1 << 30
_MAX_DEPTH = 4
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
"""How SentencePiece writes a token that is one byte; it writes U+2581 for a space."""

_FIELDS = ("kind", "vocab_size", "model", "fingerprint")


class Tokenizer(abc.ABC):
  """Text to ids in [0, vocab_size) and back."""

  kind: str
  vocab_size: int
  """V of the model. Some ids may be unused."""
  separator: int
  """The id between documents."""

  @property
  def start(self) -> int:
    """The id that a prompt starts with."""
    return self.separator

  @abc.abstractmethod
  def encode_batch(self, texts: Sequence[bytes]) -> list[Int[np.ndarray, "n"]]:
    """Encodes many texts at once, which is faster."""

  @abc.abstractmethod
  def _make_pieces(self) -> list[bytes]: ...

  @functools.cached_property
  def pieces(self) -> list[bytes]:
    """The bytes of each id; empty for the separator and unused ids."""
    return self._make_pieces()

  @abc.abstractmethod
  def _model(self) -> str:
    """Returns what `from_json` needs in addition to kind and vocab_size."""
    ...

  def encode(self, text: str | bytes) -> list[int]:
    """Returns the ids of one text, without separators."""
    if isinstance(text, str):
      text = text.encode("utf-8", "surrogatepass")
    return self.encode_batch([text])[0].tolist()

  def decode_bytes(self, ids: Ids) -> bytes:
    """Returns the exact bytes; separators and unused ids give none."""
    flat = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
    pieces = self.pieces
    return b"".join(pieces[i] for i in flat.reshape(-1).tolist())

  def decode(self, ids: Ids) -> str:
    """Returns text for display: invalid UTF-8 becomes the replacement character."""
    return self.decode_bytes(ids).decode("utf-8", "replace")

  @functools.cached_property
  def bytes_per_token(self) -> Int[np.ndarray, "V"]:
    """Bytes each id stands for (int32); 0 for the separator and unused ids."""
    return np.array([len(p) for p in self.pieces], np.int32)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Equal exactly for tokenizers that encode alike."""
    return cache.digest(self.kind, self.vocab_size, self._model())

  def to_json(self) -> str:
    """Returns everything `from_json` needs."""
    fields = {
      "kind": self.kind,
      "vocab_size": self.vocab_size,
      "fingerprint": self.fingerprint,
      "model": self._model(),
    }
    return json.dumps(fields, indent=1)

  def save(self, workdir: RunPath) -> None:
    """Stores the tokenizer with a run, unless the same one is already there."""
    path = run_path(workdir) / FILE
    text = self.to_json()
    try:
      if path.exists() and path.read_text("utf-8") == text:
        return
      make_directory(path.parent)
      files.write_text(path, text)
    except OSError as e:
      raise ConfigError(
        f"--workdir={str(workdir)!r} is not writable ({e.strerror}). Choose another."
      ) from e


class ByteTokenizer(Tokenizer):
  """Ids 0 to 255 are the bytes, 256 is the separator, 257 to 263 are unused."""

  kind = "bytes"
  vocab_size = _BYTES_VOCAB
  separator = 256

  def encode_batch(self, texts: Sequence[bytes]) -> list[Int[np.ndarray, "n"]]:
    """See the base class."""
    return [np.frombuffer(t, np.uint8).astype(np.int32) for t in texts]

  def decode_bytes(self, ids: Ids) -> bytes:
    """See the base class."""
    flat = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
    return flat[flat < 256].astype(np.uint8).tobytes()

  def _make_pieces(self) -> list[bytes]:
    return [bytes([i]) for i in range(256)] + [b""] * (self.vocab_size - 256)

  def _model(self) -> str:
    return ""


def _byte_of_char() -> dict[str, int]:
  """Returns the byte of each printable character that the library writes for it.

  Printable Latin-1 characters stand for themselves, the others for the code
  points from 256 on, in order (the convention of GPT-2's encoder).
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in set(printable)]
  table = {chr(b): b for b in printable}
  return table | {chr(256 + i): b for i, b in enumerate(others)}


class BPETokenizer(Tokenizer):
  """Byte-level BPE. The last id, vocab_size - 1, is the separator.

  Training on little text may find fewer merges than requested; the ids in between
  are unused, so that the model's shape depends only on the config.
  """

  kind = "bpe"

  def __init__(self, model: str, vocab_size: int):
    """Wraps the library's JSON."""
    self._tokenizer = tokenizers.Tokenizer.from_str(model)
    self.vocab_size = vocab_size
    self.separator = vocab_size - 1

  @classmethod
  def train(cls, texts: Iterable[bytes], vocab_size: int) -> "BPETokenizer":
    """Learns merges; the same texts give the same tokenizer.

    Raises:
      ConfigError: vocab_size is too small for all bytes and the separator, or over 2**24.
    """
    if not _MIN_BPE_VOCAB <= vocab_size <= _MAX_VOCAB:
      raise ConfigError(
        f"--config.data.vocab_size={vocab_size} must be at least {_MIN_BPE_VOCAB}"
        " (256 bytes and the separator) for --config.data.tokenizer=bpe."
      )
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    learner.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
      vocab_size=vocab_size - 1,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    )
    learner.train_from_iterator((t.decode("utf-8") for t in texts), trainer)
    return cls(learner.to_str(), vocab_size)

  def encode_batch(self, texts: Sequence[bytes]) -> list[Int[np.ndarray, "n"]]:
    """See the base class."""
    strings = []
    for text in texts:
      try:
        strings.append(text.decode("utf-8"))
      except UnicodeDecodeError:
        return [self._encode_any(t) for t in texts]
    return [
      np.array(e.ids, np.int32)
      for e in self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)
    ]

  def _encode_any(self, text: bytes) -> Int[np.ndarray, "n"]:
    """Encodes invalid UTF-8 as the ids of its single bytes, the rest as usual."""
    ids: list[int] = []
    while text:
      try:
        good, bad = text.decode("utf-8"), b""
        text = b""
      except UnicodeDecodeError as e:
        good, bad = text[: e.start].decode("utf-8"), text[e.start : e.end]
        text = text[e.end :]
      ids += self._tokenizer.encode(good, add_special_tokens=False).ids
      ids += [self._id_of_byte[b] for b in bad]
    return np.array(ids, np.int32)

  @functools.cached_property
  def _id_of_byte(self) -> dict[int, int]:
    return {p[0]: i for i, p in enumerate(self.pieces) if len(p) == 1}

  def _make_pieces(self) -> list[bytes]:
    byte_of = _byte_of_char()
    pieces = [b""] * self.vocab_size
    for token, index in self._tokenizer.get_vocab().items():
      pieces[index] = bytes(byte_of[c] for c in token)
    return pieces

  def _model(self) -> str:
    return self._tokenizer.to_str()


class ImportedTokenizer(Tokenizer):
  """The tokenizer.json of a published model.

  Text is normalised as the model was trained, so decoding may not give back every byte;
  bits per byte count the bytes that the ids stand for.
  """

  kind = "hf"

  def __init__(self, model: str, vocab_size: int):
    """Wraps a tokenizer.

    Args:
      model: JSON with `tokenizer` (the library's JSON), `separator` and `start` (ids).
      vocab_size: V of the model, at least the tokenizer's.

    Raises:
      ValueError: `model` is not as described, or has an id outside the vocabulary.
    """
    fields = files.parse_json(model, _MAX_DEPTH)
    self._json = model
    self._library_json = str(fields["tokenizer"])
    self._tokenizer = tokenizers.Tokenizer.from_str(self._library_json)
    self.vocab_size = vocab_size
    self.separator, self._start = fields["separator"], fields["start"]
    highest = max(self._tokenizer.get_vocab().values(), default=0)
    for name, index in (
      ("ids", highest),
      ("separator", self.separator),
      ("start", self.start),
    ):
      if type(index) is not int or not 0 <= index < vocab_size:
        raise ValueError(
          f"its {name} up to {index} do not fit a vocabulary of {vocab_size}"
        )

  @classmethod
  def make(
    cls, library_json: str, vocab_size: int, *, separator: int, start: int
  ) -> "ImportedTokenizer":
    """Returns the tokenizer of a tokenizer.json; raises as the constructor."""
    fields = {"tokenizer": library_json, "separator": separator, "start": start}
    return cls(json.dumps(fields), vocab_size)

  def id_of(self, token: str) -> int | None:
    """Returns the id of a token by its name; None if there is none."""
    return self._tokenizer.token_to_id(token)

  @property
  def library_json(self) -> str:
    """The tokenizer.json that it was made from."""
    return self._library_json

  @property
  def start(self) -> int:
    return self._start

  def encode_batch(self, texts: Sequence[bytes]) -> list[Int[np.ndarray, "n"]]:
    """See the base class. Invalid UTF-8 becomes the replacement character."""
    strings = [text.decode("utf-8", "replace") for text in texts]
    encoded = self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)
    return [np.array(e.ids, np.int32) for e in encoded]

  def _make_pieces(self) -> list[bytes]:
    byte_of = _byte_of_char()
    is_byte_level = '"ByteLevel"' in self._library_json
    added = self._tokenizer.get_added_tokens_decoder()
    pieces = [b""] * self.vocab_size
    for token, index in self._tokenizer.get_vocab().items():
      if index in added:
        special = added[index].special
        pieces[index] = b"" if special else added[index].content.encode()
      elif is_byte_level and all(c in byte_of for c in token):
        pieces[index] = bytes(byte_of[c] for c in token)
      elif _BYTE_TOKEN.fullmatch(token):
        pieces[index] = bytes([int(token[3:5], 16)])
      else:
        pieces[index] = token.replace("\u2581", " ").encode()
    return pieces

  def _model(self) -> str:
    return self._json


def from_json(text: str | bytes) -> Tokenizer:
  """Returns the tokenizer that `to_json` wrote.

  Raises:
    ValueError: the text is no tokenizer, or was altered.
  """
  fields = files.parse_json(text, _MAX_DEPTH)
  if not isinstance(fields, dict) or not set(_FIELDS) <= set(fields):
    raise ValueError(f"it does not have the fields {', '.join(_FIELDS)}")
  kind, size, model, fingerprint = (fields[name] for name in _FIELDS)
  if fingerprint != cache.digest(kind, size, model):
    raise ValueError("its fingerprint does not match its content")
  if kind == "bytes":
    return ByteTokenizer()
  if kind == "hf":
    try:
      return ImportedTokenizer(model, size)
    except Exception as e:  # the library raises nothing narrower
      raise ValueError(str(e) or type(e).__name__) from e
  # A fingerprint is not a signature: anyone can make one.
  if kind != "bpe" or type(size) is not int or not _MIN_BPE_VOCAB <= size <= _MAX_VOCAB:
    raise ValueError(f"it is of kind {kind!r} with {size!r} ids")
  try:
    loaded = BPETokenizer(model, size)
    complete = all(bytes([b]) in loaded.pieces[:-1] for b in range(256))
  except Exception as e:  # the library raises nothing narrower
    raise ValueError(str(e) or type(e).__name__) from e
  if not complete:
    raise ValueError("it does not cover all bytes")
  return loaded


def load_tokenizer(workdir: RunPath | str) -> Tokenizer:
  """Returns a run's tokenizer, from its directory alone.

  Raises:
    UserError: the directory holds no tokenizer, or a damaged one.
  """
  path = run_path(workdir) / FILE
  try:
    with files.open_regular(path) as file:
      return from_json(file.read(_MAX_BYTES))
  except OSError as e:
    raise UserError(
      f"--workdir={str(workdir)!r} holds no readable tokenizer ({FILE}: "
      f"{e.strerror or e}). Is it a run's directory? If a folder without tokenizer.json "
      "was converted into it, convert the folder with that file to a new --workdir."
    ) from e
  except (ValueError, RecursionError) as e:
    raise UserError(
      f"{path} is damaged: {' '.join(str(e).split())[:200]}. Copy it from a backup, or "
      "from another run of the same text and --config.data.vocab_size: it is the same."
    ) from e


def check_name(name: str) -> None:
  """Rejects an unknown `config.data.tokenizer`."""
  if name not in TOKENIZERS:
    raise ConfigError(
      f"--config.data.tokenizer={name!r} is unknown. {did_you_mean(name, TOKENIZERS)}"
    )
