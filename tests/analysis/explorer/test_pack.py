"""Packed columns come back as they were, and hold no markup."""

import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from moejax.analysis.explorer import pack

_TYPES = st.sampled_from([np.uint8, np.uint16, np.uint32])


@settings(deadline=None, max_examples=50)
@given(_TYPES.flatmap(lambda t: stn.arrays(t, stn.array_shapes(max_dims=2, min_side=0))))
def test_columns_come_back_bit_for_bit(values):
  """With differences too, which wrap around; other columns beside it do no harm."""
  columns = {"a": values, "b": np.array([1.5, -2.0], np.float32)}
  for differences in ((), ("a",)):
    found = pack.unpack(pack.pack(columns, differences))
    for name, column in columns.items():
      assert found[name].dtype == column.dtype and found[name].shape == column.shape
      np.testing.assert_array_equal(found[name], column)


def test_whatever_the_text_is_the_page_gets_no_markup():
  """Ends of scripts, quotes, controls, emoji and lone surrogates: only base64 is left."""
  texts = ["</script><b>", "'\"\\", "\x00\x1b\u202e", "\U0001f600", "\ud800"]
  packed = pack.pack_json(texts)
  assert re.fullmatch(r"[A-Za-z0-9+/=]+", packed)
  assert pack.inflate(packed).decode().count("script") == 1


def test_quantized_weights_are_within_the_error_told():
  values = np.random.default_rng(0).uniform(0, 2.5, 1000)
  codes, scale = pack.quantized(values)
  bound = scale * (codes + 0.25) / 255**2 + 1e-12
  assert (np.abs(pack.restored(codes, scale) - values) <= bound).all()
  assert pack.quantized(np.array([np.nan, 0.0]))[0].tolist() == [0, 0]


def test_rounded_floats_keep_eight_bits():
  values = np.random.default_rng(0).normal(size=1000)
  np.testing.assert_allclose(pack.rounded(values), values, rtol=2.0**-8)
  assert not (pack.rounded(values).view(np.uint32) & 0xFFFF).any()


def test_ids_have_the_smallest_type():
  for largest, dtype in ((255, np.uint8), (256, np.uint16), (1 << 16, np.uint32)):
    assert pack.ids(np.array([0]), largest).dtype == dtype
