"""The page as a file: nothing from outside, nothing unescaped, small enough."""

import json
import re

import numpy as np
import pytest

from moejax.analysis.explorer import facts, pack, page, sample
from tests.analysis.explorer import cases


@pytest.fixture(scope="module")
def rendered():
  """Without the library of plots."""
  found, tokens, names = cases.attack()
  pictures = {"load": '<figure id="picture"></figure>'}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(page, "library", lambda: None)
    return found, tokens, names, page.render(found, ["<i>1"], tokens, names, pictures)


def _block(text: str, name: str) -> str:
  (found,) = re.findall(rf'id="data-{name}">([^<]*)</script>', text)
  return found


def test_nothing_is_fetched_and_nothing_of_the_run_is_markup(rendered):
  """Names and words hold tags and quotes: none of them is in the page as such."""
  text = rendered[3]
  assert not re.search(r"(src|href)=\"(?!data:)|https?://(?!vega.github.io/schema)", text)
  for attack in ("<b>", "<img src=x", "<i>1"):
    assert attack not in text
  assert "&lt;b&gt;" in text and "&lt;i&gt;1" in text
  assert text.count("</script>") == text.count("<script")


def test_without_the_library_of_plots_the_page_has_pictures(rendered):
  """The extra is not needed for a page."""
  text = rendered[3]
  assert 'id="picture"' in text and 'id="data-library"' not in text


def test_the_page_decodes_to_the_sample(rendered):
  """Choices, drops and words of every token, read back from the file."""
  _, tokens, names, text = rendered
  known = json.loads(pack.inflate(_block(text, "facts")))
  columns = pack.unpack(_block(text, "text"))
  strings = [known["sample"]["strings"][i] for i in columns["string"]]
  assert strings == facts.token_texts(tokens, names.pieces)
  np.testing.assert_array_equal(columns["token"], tokens.token)
  np.testing.assert_array_equal(columns["sequence"], tokens.sequence)
  for layer in range(len(tokens.expert)):
    found = pack.unpack(_block(text, f"layer{layer}"))
    np.testing.assert_array_equal(found["expert"].T, tokens.expert[layer])
    np.testing.assert_array_equal(found["other"].T, tokens.other[layer])
    bits = np.unpackbits(found["kept"], axis=0, bitorder="little")
    np.testing.assert_array_equal(bits[: tokens.expert.shape[-1]].T, tokens.kept[layer])
    gates = pack.restored(found["gate"].T, known["sample"]["gateScale"][layer])
    np.testing.assert_allclose(gates, tokens.gate[layer], atol=4e-3)


def test_a_choice_costs_two_bytes():
  """What the size of a page is made of: expert and weight of each choice, in base64."""
  _, tokens, _ = cases.synthetic(layers=1, experts=64, choices=8, tokens=20_000)
  packed = pack.pack(facts.layer_columns(tokens, 0, 64), differences=("gate",))
  assert len(packed) / 20_000 < 22  # Of 8 choices, 2 alternatives and a byte of drops.


@pytest.mark.slow
def test_a_page_of_64_experts_and_16_layers_is_at_most_8_megabytes():
  """20,000 tokens with eight choices and two alternatives, none of them predictable.

  Uniform experts are the worst that a text can be: real ones deflate to less.
  """
  found, tokens, names = cases.synthetic(layers=16, experts=64, choices=8, tokens=20_000)
  text = page.render(found, ["a"] * 3, tokens, names, {})
  assert 'id="data-library"' in text
  assert 1e6 < len(text.encode()) <= 8e6


def test_no_sample_is_a_page_without_text():
  found, _, names = cases.synthetic(layers=1, experts=4, choices=2, tokens=10)
  names = [name for name, _ in page.blobs(found, None, names)]
  assert names == ["facts", "matrices"]


def test_columns_of_many_experts_and_choices():
  """More than 255 experts and more than eight choices take two bytes of each."""
  _, tokens, _ = cases.synthetic(layers=1, experts=300, choices=9, tokens=10)
  found = facts.layer_columns(tokens, 0, 300)
  assert found["expert"].dtype == np.uint16 and found["kept"].shape == (2, 10)
  assert isinstance(tokens, sample.Sample)
