"""The first sentences of an analysis: its numbers, and what to compare them with."""

from moejax.analysis import sentences


def _layer(layer: int, **changes) -> dict:
  load = {"share": [0.75, 0.25], "max_ratio": 1.5, "dead": []}
  drops = {"tokens": [30, 10], "lost": [0.0, 0.4], "dropped": [0.0, 0.4]}
  words = {"input": {"favourite": 0.7, "chance": 0.2}}
  domains = {"information_fraction": 0.02, "chance": 0.001}
  whole = {"load": load, "drops": {"place": drops}, "words": words, "domains": domains}
  return {"layer": layer} | whole | changes


def _said(*layers: dict, **changes) -> list[str]:
  found = {"layers": layers, "num_experts": 2, "num_selected": 1}
  found |= {"capacity_factor": 1.25, "undefined": {}}
  return sentences.sentences(found | changes)


def test_loads_and_drops_are_those_of_the_worst_layer():
  """Ten of forty tokens lose 40% of their choices: 10% in all."""
  even = {"share": [0.5, 0.5], "max_ratio": 1.0, "dead": []}
  text = _said(_layer(1, load=even), _layer(3))[0]
  assert "1.50 times" in text and "expert 0 of layer 3" in text
  assert "all experts are used" in text
  assert "capacity of 1.25 drops up to 10.0%" in text
  dead = {"share": [1.0, 0.0], "max_ratio": 2.0, "dead": [1]}
  assert "1 of 2 experts never" in _said(_layer(1, load=dead))[0]
  assert "drops" not in _said(_layer(1), capacity_factor=None)[0]


def test_the_largest_load_there_can_be_is_said():
  """A token chooses an expert once: E/K even loads, of the stack that the layer is in;
  nothing where tokens do not choose."""
  layer = _layer(1)
  assert (
    "1.50 times an even load, of at most 4 ("
    in _said(layer, num_experts=8, num_selected=2)[0]
  )
  stacks = {"encoder": {"num_experts": 16, "num_selected": 1}}
  text = _said(layer | {"layer": "encoder.1"}, stacks=stacks)[0]
  assert "of at most 16 (expert 0 of layer encoder.1)" in text
  text = _said(layer, undefined={"ranks": "experts choose"})[0]
  assert "1.50 times an even load (" in text


def test_what_is_not_read_of_a_text_is_said():
  """Pieces of one document, or documents; nothing where nothing is left out."""
  own = {"duplicates": 2, "duplicate_bytes": 1234, "skipped": 0, "is_cut": True}
  said = sentences.left_out({"text": "a.txt", "left_out": own})
  assert said == "Left out of a.txt: equal to earlier pieces: 2 (1,234 bytes)."
  own = {"duplicates": 0, "duplicate_bytes": 0, "skipped": 3, "is_cut": False}
  said = sentences.left_out({"text": "a", "left_out": own})
  assert said == "Left out of a: empty or not text: 3."
  assert sentences.left_out({"text": "a", "left_out": own | {"skipped": 0}}) == ""
  assert sentences.left_out({"text": None}) == ""


def test_a_preference_is_one_only_above_chance():
  text = _said(_layer(1))[1]
  assert text.startswith("Experts follow words") and "70%" in text and "20%" in text
  assert "at most 2.0% of the uncertainty" in text
  chance = {"input": {"favourite": 0.25, "chance": 0.2}}
  told = {"information_fraction": 0.4, "chance": 0.0}
  text = _said(_layer(1, words=chance, domains=told))[1]
  assert text.startswith("Experts hardly follow words")
  assert "at most 40.0%" in text


def test_what_matters_is_the_knock_out_or_unknown():
  row = {"layer": 3, "delta": [0.1, 0.5], "error": [0.01, 0.02]}
  text = _said(_layer(3), knockout=[row])[2]
  assert (
    "1 of layer 3: +0.5000 (± 0.0400, two standard errors)" in text
    and "1.7 times" in text
  )
  assert "--knockout" in _said(_layer(3))[2]


def test_a_router_without_words_says_why():
  layer = {"layer": 0, "load": _layer(0)["load"]}
  text = _said(layer, undefined={"words": "router soft mixes"})[1]
  assert text.endswith("router soft mixes.")
