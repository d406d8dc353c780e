"""Continue a text with a trained model.

  python -m experiments.generate --workdir=DIR --prompt="def main():" [--step=N]
    [--temperature=0.8] [--top_k=0] [--top_p=1] [--max_tokens=200] [--seed=0]
    [--num_samples=1]

Needs only the run's directory, and runs in one process. --prompt may be given several
times; without a prompt the model starts a new document. An encoder-decoder restores the
spans at <extra_id_0>, <extra_id_1> ... in the prompt, or goes on at its end. Keys and
values are cached; tokens/s counts the one-token steps of all samples, without
compilation and prefill.
"""

import pathlib
from typing import Any

from absl import flags

from moejax.cli import flags as cli
from moejax.errors import UserError
from moejax.run import compilation_cache

_PROMPT = flags.DEFINE_multi_string("prompt", None, "Text to continue; repeatable.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "Read the prompt from a file.")
_STEP = flags.DEFINE_integer(
  "step", None, "Which checkpoint; default: the newest.", lower_bound=0
)
_MAX_TOKENS = flags.DEFINE_integer(
  "max_tokens", 200, "Maximum tokens per sample.", lower_bound=1, upper_bound=2**31 - 1
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature",
  0.8,
  "Sampling temperature; 0 means greedy.",
  lower_bound=0,
  upper_bound=1e6,
)
_TOP_K = flags.DEFINE_integer(
  "top_k",
  0,
  "Sample from the k most probable tokens; 0 means all.",
  lower_bound=0,
  upper_bound=2**31 - 1,
)
_TOP_P = flags.DEFINE_float(
  "top_p",
  1.0,
  "Sample from the most probable tokens, up to total probability p; 1 means all.",
  lower_bound=0,
  upper_bound=1,
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Same seed, same samples.", lower_bound=0, upper_bound=2**31 - 1
)
_NUM_SAMPLES = flags.DEFINE_integer(
  "num_samples", 1, "Samples per prompt.", lower_bound=1, upper_bound=65_536
)


def main() -> None:
  workdir, prompts = cli.run_location(), _prompts()
  # jax is imported after the flags are checked.
  from moejax.checkpoint.manager import peek, restore_params
  from moejax.data.sentinels import with_sentinels
  from moejax.data.tokenizer import load_tokenizer
  from moejax.evaluate import generation
  from moejax.launch import distributed, host_memory
  from moejax.models.make import make_model

  rank = distributed.find_rank()
  if rank is not None and rank.count > 1:
    raise UserError(
      f"Text is sampled in one process, and this is one of {rank.count}: start it by "
      "itself, without a launcher."
    )
  host_memory.keep_freed_pages()
  _, config, meta = peek(workdir, _STEP.value)
  config = cli.get_config(base=config)
  compilation_cache.enable(config.data.cache_dir)
  tokenizer = with_sentinels(load_tokenizer(workdir), config.data)
  model = make_model(config.model, config.moe, vocab_size=tokenizer.vocab_size)
  how: dict[str, Any] = {
    "max_length": generation.context_length(config),
    "max_tokens": _MAX_TOKENS.value,
    "temperature": _TEMPERATURE.value,
    "top_k": _TOP_K.value,
    "top_p": _TOP_P.value,
    "seed": _SEED.value,
    "num_samples": _NUM_SAMPLES.value,
  }
  # Before reading parameters, which may take minutes.
  generation.check(model, tokenizer, prompts, **how)
  params, _, meta = restore_params(workdir, _STEP.value)
  generated = generation.generate(model, params, tokenizer, prompts, **how)
  for number, sample in enumerate(generated.completions):
    if len(generated.completions) > 1:
      print(f"--- sample {number + 1} of {len(generated.completions)}")
    filled = sample.filled is not None
    print(sample.filled if filled else f"{sample.prompt}{sample.text}")
    if filled:
      print(f"--- restored: {sample.text}")
  reasons = sorted({sample.finish for sample in generated.completions})
  print(
    f"--- step {meta['step']}: {generated.num_tokens} tokens at "
    f"{generated.tokens_per_second:,.0f} tokens/s (compiling and reading the prompt, "
    f"{generated.compile_seconds:.1f} s, not counted); ended by {', '.join(reasons)}"
  )


def _prompts() -> list[str]:
  if _PROMPT.value is not None and _PROMPT_FILE.value:
    raise UserError("--prompt and --prompt_file exclude each other: give one.")
  if not _PROMPT_FILE.value:
    return _PROMPT.value or [""]
  try:
    return [pathlib.Path(_PROMPT_FILE.value).read_text("utf-8", "replace")]
  except OSError as e:
    raise UserError(f"--prompt_file={_PROMPT_FILE.value}: {e.strerror}.") from e


def run() -> None:
  """Runs the program."""
  cli.define_config(default=None)
  compilation_cache.define_flag()
  cli.run(main, buckets=("workdir",))


if __name__ == "__main__":
  run()
