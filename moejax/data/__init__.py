"""From text to batches: see docs/data.md.

`load` is the entry point; a `Dataset` yields batches.
"""

from moejax.data.dataset import Dataset, load

__all__ = ["Dataset", "load"]
