"""The harness's own `hf` model on a folder, for a Python with torch and lm_eval.

  python -m tests.evaluate.lm_eval_script FOLDER < REQUESTS > ANSWERS

Requests are a JSON object: the arguments of each kind. So are the answers.
"""

import json
import sys
from typing import Any

from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]


def main() -> None:
  # Its constructor is wrapped: with lm_eval installed, no argument of it is known.
  make_model: Any = HFLM
  model = make_model(
    pretrained=sys.argv[1],
    device="cpu",
    dtype="float32",
    batch_size=2,
    # torch's grouped products need widths of multiples of 16 bytes.
    experts_implementation="eager",
  )
  answers = {}
  for kind, asked in json.load(sys.stdin).items():
    # As moejax, which puts the start before every text; of a whole text, the harness does
    # so itself, and would predict a second one.
    model.add_bos_token = kind != "loglikelihood_rolling"
    requests = [
      Instance(request_type=kind, doc={}, arguments=tuple(arguments), idx=index)
      for index, arguments in enumerate(asked)
    ]
    answers[kind] = getattr(model, kind)(requests)
  json.dump(answers, sys.stdout)


if __name__ == "__main__":
  main()
