"""Text to batches: see docs/data.md.

`load` is the entrance; a `Dataset` gives batches.
"""

from moejax.data.dataset import Dataset, load

__all__ = ["Dataset", "load"]
