"""Writes tests/data/corpus: python -m tests.data.make_corpus

A small text of our own, for tests that need the same bytes under every Python:
the standard library's text varies with the version. The sentences come from a toy
grammar, a linear congruential generator choosing, so it is as regular as a small
model can learn and no more anyone's than a multiplication table. The committed
files are what counts; a test keeps this script and them together.
"""

import json
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"

_WHO = ["the miller", "a sailor", "the old clerk", "my sister", "a fox", "the baker"]
_DID = ["carried", "counted", "lost", "painted", "sold", "remembered", "hid"]
_WHAT = ["seven apples", "a blue lamp", "the map", "two letters", "a bell", "the rope"]
_WHERE = ["by the river", "in the attic", "under the bridge", "at the market"]
_WHEN = ["In the morning", "Before noon", "At dusk", "When it rained", "That winter"]
_WHY = ["because the door was open", "so that no one would ask", "and nobody saw it"]
_NOTES = """# Experts and queues

A router gives every token a score for every expert. The token goes to the expert
with the highest score, and the score, made a probability, scales what comes back.
If the queue of an expert is full, the token passes by: it is dropped, and the
residual connection carries it to the next layer unchanged.

Ties are broken by the lowest index, so that two runs agree. Padding is never
routed. A loss that is one at perfect balance keeps the queues of equal length.

Grüße: this file holds a few characters beyond ASCII, naïve as they are: é, 雪, 🦊.
"""


class _Dice:
  """A linear congruential generator: the same on every machine and version."""

  def __init__(self, seed: int):
    self.state = seed

  def choose(self, options):
    """One of the options."""
    self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
    return options[(self.state >> 33) % len(options)]


def _story(seed: int) -> str:
  dice = _Dice(seed)
  lines = []
  for _ in range(dice.choose(range(2, 7))):
    sentences = []
    for _ in range(dice.choose(range(2, 6))):
      who, did, what = dice.choose(_WHO), dice.choose(_DID), dice.choose(_WHAT)
      tail = dice.choose([dice.choose(_WHERE), dice.choose(_WHY)])
      sentences.append(f"{dice.choose(_WHEN)} {who} {did} {what} {tail}.")
    lines.append(" ".join(sentences))
  return "\n\n".join(lines) + "\n"


def _table(factor: int) -> str:
  return "".join(f"{factor} x {i} = {factor * i}\n" for i in range(1, 21))


def _function(seed: int) -> str:
  dice = _Dice(1000 + seed)
  name = dice.choose(["total", "mean", "scale", "shift", "clip", "merge"])
  op = dice.choose(["+", "*", "-"])
  return (
    f"def {name}_{seed}(values, amount={dice.choose(range(2, 10))}):\n"
    f'  """Returns each value {op} amount."""\n'
    f"  result = []\n"
    f"  for value in values:\n"
    f"    result.append(value {op} amount)\n"
    f"  return result\n"
  )


def contents() -> dict[str, str]:
  """Text of each file, by its path below `CORPUS`."""
  files = {f"stories/{i:02}.txt": _story(i) for i in range(40)}
  files |= {f"tables/{i:02}.txt": _table(i) for i in range(2, 22)}
  files |= {f"code/f{i:02}.txt": _function(i) for i in range(24)}
  files["notes/experts.md"] = _NOTES
  records = ({"text": _story(100 + i), "id": i} for i in range(16))
  files["more.jsonl"] = "".join(json.dumps(r) + "\n" for r in records)
  return files


def main() -> None:
  """Writes all files."""
  for name, text in contents().items():
    path = CORPUS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


if __name__ == "__main__":
  main()
