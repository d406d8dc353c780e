"""The selectors of frozen parameters that an operation keeps.

A selector is kept if it names nothing that the operation makes. One that names experts,
their router or the rest of a new feed-forward is removed entirely.
"""

import fnmatch

from moejax.checkpoint import fingerprint
from moejax.config.selectors import parse
from moejax.models.decoder import TABLE
from moejax.surgery.change import FEED_FORWARD, Change


def still_frozen(change: Change) -> str:
  """Returns the selectors of the old run that hold for the new one, as text.

  Nothing is frozen that was not frozen before. No selector is kept from a list beginning
  with `!`, which freezes all but a part, or if parameters are averages of several runs.
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
      # Rows belong to experts.
      holds = bool(kept and found & same and selector.rows is None)
    else:
      holds = bool(found and not found & changed)
    if holds:
      kept.append(selector.text)
  return ",".join(kept)


def _made(change: Change) -> list[str]:
  """Returns the prefixes of the names of all arrays whose meaning has changed."""
  if change.old_layers != change.new_layers:
    # The same name may now belong to another layer.
    return [TABLE, *(f"{w.block}." for w in (*change.old_layers, *change.new_layers))]
  blocks = {change.new_layers[number].block for number in change.made}
  return [TABLE, *(f"{block}.{part}" for block in blocks for part in FEED_FORWARD)]
