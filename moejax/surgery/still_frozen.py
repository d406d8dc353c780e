"""Which selectors of frozen parameters an operation keeps.

Those that name nothing which the operation makes still mean what they did. One that
names experts, their router or the rest of a new feed-forward goes whole.
"""

import fnmatch

from moejax.checkpoint import fingerprint
from moejax.config.selectors import parse
from moejax.models.decoder import TABLE
from moejax.surgery.change import FEED_FORWARD, Change


def still_frozen(change: Change) -> str:
  """Returns the selectors of the old run that hold for the new one, as text.

  Nothing is frozen that was not. None is kept of a list that begins with `!`, which
  freezes all but a part, or where parameters are averages of several runs.
  """
  selectors = parse(change.old.train.frozen)
  if not change.operation.keeps_moments or not selectors or selectors[0].takes_back:
    return ""
  new = set(fingerprint.named_leaves(change.shapes))
  names = new | set(fingerprint.named_leaves(change.old_model.shapes()))
  made = tuple(_made(change))
  changed = {name for name in names if name.startswith(made)}
  same = new - changed
  kept: list[str] = []
  for selector in selectors:
    found = set(fnmatch.filter(names, selector.pattern))
    if selector.takes_back:
      # Rows are those of experts.
      holds = bool(kept and found & same and selector.rows is None)
    else:
      holds = bool(found and not found & changed)
    if holds:
      kept.append(selector.text)
  return ",".join(kept)


def _made(change: Change) -> list[str]:
  """Returns the beginnings of the names of all arrays that mean something else now."""
  if change.old_layers != change.new_layers:
    # The same name may be that of another layer.
    return [TABLE, *(f"{w.block}." for w in (*change.old_layers, *change.new_layers))]
  blocks = {change.new_layers[number].block for number in change.made}
  return [TABLE, *(f"{block}.{part}" for block in blocks for part in FEED_FORWARD)]
