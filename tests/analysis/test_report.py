"""Figures and page: drawn from what is there, and nothing from outside."""

import json

import numpy as np
import pytest

from moejax.analysis import figures, report
from moejax.analysis.explorer import page


def _found() -> dict:
  """The least that an analysis says, of two layers of two experts."""
  share = {"share": [0.75, 0.25], "importance": [0.6, 0.4]}
  load = share | {"max_ratio": 1.5, "min_ratio": 0.5, "dead": []}
  choice = {"entropy_fraction": 0.5, "margin": 0.1, "tied_fraction": 0.0}
  word = {"favourite": 0.7, "chance": 0.2}
  layer = {
    "layer": 1,
    "load": load,
    "choices": choice,
    "words": dict.fromkeys(("input", "target", "predicted"), word),
    "experts": {"cka": [[1, 0], [0, 1]], "largest_output": [1.0, 2.0]},
  }
  return {
    "workdir": "runs/<b>",
    "step": 10,
    "split": "validation",
    "text": None,
    "router": "top_k",
    "num_selected": 1,
    "num_experts": 2,
    "tokens": 8,
    "loss": 2.5,
    "domains": [],
    "undefined": {"coactivation": "with K=1 no token has two experts"},
    "layers": [layer, layer | {"layer": 3}],
    "knockout": [{"layer": 3, "delta": [0.1, 0.5], "error": [0.01, 0.02]}],
    "replay": [
      {
        "setting": {"capacity_factor": factor},
        "layers": [{"layer": 1, "exact": True, "drop_fraction": 1 / factor / 4}],
      }
      for factor in (1.0, 2.0)
    ],
  }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  out = tmp_path_factory.mktemp("analysis")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(page, "library", lambda: None)  # Takes seconds to make.
    return out, report.write(_found(), out)


def test_only_what_was_measured_is_drawn(written):
  """No pairs with K=1, no checkpoints: no figures of them."""
  out, paths = written
  names = {path.stem for path in (out / "figures").iterdir()}
  assert names == {"load", "specialisation", "similarity", "knockout", "replay"}
  assert all((out / "figures" / f"{name}.pdf").stat().st_size for name in names)
  assert json.loads(paths[0].read_text())["loss"] == 2.5


def test_many_layers_are_a_choice_of_few():
  """The first and the last among them."""
  rows = list(range(30))
  some = figures._some(rows)
  assert (len(some), some[0], some[-1]) == (figures.MAX_PANELS, 0, 29)
  assert np.all(np.diff(some) > 5)


def _two_layers() -> dict:
  """Layer 1 is at its chance, layer 3 far above a chance that is higher."""
  rows = [
    {
      "step": step,
      "layers": [
        {"layer": 1, "saturation": 0.2, "chance": 0.2},
        {"layer": 3, "saturation": 0.9, "chance": 0.5},
      ],
    }
    for step in (100, 101)
  ]
  layers = [
    {
      "layer": number,
      "load": {"share": [0.5, 0.5]},
      "consistency": {
        "segments": [{"tokens": 64, "covered": [0.6, 1.0], "chance": [chance, 1.0]}],
        "lru_hit_rate": [0.5, 1.0],
      },
    }
    for number, chance in ((1, 0.3), (3, 0.5))
  ]
  return {"saturation": rows, "layers": layers}


@pytest.mark.parametrize(
  ("draw", "chances"),
  [(figures.saturation, [0.2, 0.5]), (figures.consistency, [0.3, 0.5])],
)
def test_each_layer_has_a_chance_of_its_own(draw, chances):
  """Dashed, in the colour of its layer: one mean would make a layer look bad that is at
  its own chance."""
  panel = draw(_two_layers()).axes[0]
  drawn = [line for line in panel.lines if len(line.get_xdata())]
  whole, dashed = drawn[::2], drawn[1::2]
  assert {line.get_linestyle() for line in dashed} == {"--"}
  assert [line.get_ydata()[0] for line in dashed] == chances
  colours = [line.get_color() for line in whole]
  assert [line.get_color() for line in dashed] == colours and len(set(colours)) == 2
  names = [text.get_text() for text in panel.get_legend().get_texts()]
  assert names == ["layer 1", "layer 3", "chance, each layer's own"]


def test_no_line_joins_encoder_and_decoder():
  """One of each stack, in one colour and named once."""
  word = {"favourite": 0.7, "chance": 0.2}
  names = ("encoder.1", "encoder.3", "decoder.1", "decoder.3")
  layers = [{"layer": name, "words": {"input": word}} for name in names]
  panel = figures.specialisation({"layers": layers}).axes[0]
  lines = [list(line.get_xdata()) for line in panel.lines if len(line.get_xdata())]
  assert lines == [["encoder.1", "encoder.3"], ["decoder.1", "decoder.3"]] * 2
  assert panel.lines[0].get_color() == panel.lines[1].get_color()
  named = [text.get_text() for text in panel.get_legend().get_texts()]
  assert named.count("input id") == named.count("shuffled") == 1


@pytest.mark.parametrize("draw", [figures.load, figures.saturation, figures.consistency])
def test_experts_and_steps_have_whole_ticks(draw):
  """Two experts, or steps 100 and 101, have nothing to be named between them."""
  figure = draw(_two_layers())
  figure.draw_without_rendering()
  for panel in figure.axes[: 2 if draw is figures.consistency else 1]:
    ticks = panel.get_xticks()
    assert np.all(ticks == np.round(ticks))
