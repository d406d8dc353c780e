"""The tiny model of tests/train, its compiled steps and its corpus."""

from tests.train.conftest import cache_dir, compilation_cache, gradients, setup

__all__ = ["cache_dir", "compilation_cache", "gradients", "setup"]
