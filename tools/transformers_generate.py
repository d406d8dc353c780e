"""Transformers' side of `tools.benchmark_generate`: needs torch and transformers only.

  python tools/transformers_generate.py FOLDER CORES

Loads the model in FOLDER in float32, prints "ready VERSION", and then, for each line of
standard input, "ROWS PROMPT NEW", prints the seconds that `generate` took (greedy).
"""

import sys
import time

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]


def main() -> None:
  folder, cores = sys.argv[1], int(sys.argv[2])
  torch.set_num_threads(cores)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  model.generation_config.eos_token_id = None
  model.eval()
  print("ready", transformers.__version__, flush=True)
  generator = torch.Generator().manual_seed(0)
  for line in sys.stdin:
    rows, prompt, new = (int(word) for word in line.split())
    size = (rows, prompt)
    ids = torch.randint(1, model.config.vocab_size, size, generator=generator)
    with torch.inference_mode():
      began = time.perf_counter()
      out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
      )
      seconds = time.perf_counter() - began
    assert out.shape == (rows, prompt + new)
    print(seconds, flush=True)


if __name__ == "__main__":
  main()
