"""Scaling laws: the papers' own tables, limits, and inputs counted by hand."""

import dataclasses
import math
import pathlib
import warnings

import numpy as np
import pytest

from configs import default
from moejax.config import Config
from moejax.cost import flops
from moejax.errors import ConfigError, UserError
from moejax.sweep.laws import definitions
from moejax.sweep.laws import published as laws


@pytest.mark.parametrize(
  ("experts", "n", "d", "loss"),
  [(1, 1.72e9, 9.70e9, 2.590), (8, 989e6, 16.9e9, 2.529), (32, 676e6, 24.7e9, 2.472)],
)
def test_ludziejewski_splits_1e20_flops_as_the_paper_does(experts, n, d, loss):
  """C = 6 N D; the optimum is flat, so N and D agree less closely than the loss."""
  best = laws.Ludziejewski().optimum(1e20, E=experts)
  assert pytest.approx(n, rel=0.01) == best.N
  assert pytest.approx(d, rel=0.01) == best.D
  assert best.loss == pytest.approx(loss, abs=5e-4)
  assert pytest.approx(1e20) == 6 * best.N * best.D


def test_ludziejewski_at_eight_experts_is_the_papers_chinchilla_form():
  """The paper prints 21.83 N^-0.1676 + 119.91 D^-0.2338 from unrounded constants."""
  law = laws.Ludziejewski().at_experts(8)
  assert law.a == pytest.approx(21.83, rel=1e-3)
  assert law.b == pytest.approx(119.91, rel=1e-3)
  assert law.alpha == pytest.approx(0.1676, abs=1e-4)
  assert law.beta == pytest.approx(0.2338, abs=1e-4)
  where = dict(N=5e8, D=1e10)
  assert law.predict(**where) == laws.Ludziejewski().predict(**where, E=8)


def test_optimum_agrees_with_the_closed_form_of_chinchillas_law():
  """N* = (alpha a / beta b)^(1/(alpha+beta)) (C/6)^(beta/(alpha+beta)), equation 4."""
  law = laws.Ludziejewski().at_experts(8)
  scale = (law.alpha * law.a / (law.beta * law.b)) ** (1 / (law.alpha + law.beta))
  exact = scale * (1e20 / 6) ** (law.beta / (law.alpha + law.beta))
  assert pytest.approx(exact, rel=1e-5) == law.optimum(1e20).N


KRAJEWSKI = [
  (100e6, 4.37e9, 8, 2.95e18, 3.133),
  (1e9, 28.94e9, 16, 1.93e20, 2.491),
  (3e9, 72.90e9, 16, 1.41e21, 2.245),
  (7e9, 137.60e9, 32, 6.46e21, 2.076),
  (70e9, 941.07e9, 32, 4.16e23, 1.694),
  (300e9, 2.96e12, 64, 5.69e24, 1.503),
  (1e12, 7.94e12, 64, 4.97e25, 1.367),
]
"""Compute-optimal models: dense parameters (12 d^2 a block), D, G, C, loss."""


@pytest.mark.parametrize(("dense", "d", "granularity", "budget", "loss"), KRAJEWSKI)
def test_krajewski_reproduces_the_table_of_compute_optimal_models(
  dense, d, granularity, budget, loss
):
  """FLOPs to the table's rounding; the best G among powers of two; N and D within 3%.

  Constants have two to three digits, which moves the loss by up to 0.024.
  """
  law = laws.Krajewski()
  n = dense * (8 * 64 + 4) / 12
  assert law.flops_per_token(n, G=granularity) * d == pytest.approx(budget, rel=5e-3)
  assert law.formula(N=n, D=d, G=granularity) == pytest.approx(loss, abs=0.024)
  best = {g: law.optimum(budget, G=g) for g in (1, 2, 4, 8, 16, 32, 64, 128)}
  chosen = min(best, key=lambda g: best[g].loss)
  assert chosen == granularity
  assert pytest.approx(n, rel=0.03) == best[chosen].N
  assert pytest.approx(d, rel=0.03) == best[chosen].D


def test_ling_gives_the_papers_best_granularity_and_leverage():
  """8 to 12 in the text, and more than 7 at 1e22 FLOPs, 3.1% active, G = 12."""
  law = laws.Ling()
  assert law.best_granularity == pytest.approx(11.3, abs=0.05)
  assert law.predict(C=1e22, A=0.031, G=12) == pytest.approx(7.24, abs=0.01)
  grid = np.linspace(2, 40, 381)
  best = grid[law.predict(C=1e21, A=0.05, G=grid).argmax()]
  assert best == pytest.approx(law.best_granularity, abs=0.1)


@pytest.mark.parametrize("dense", [False, True])
def test_lings_allocation_spends_the_budget(dense):
  """M * D = C, to the rounding of the printed coefficients."""
  m, d = laws.Ling.allocation(1e21, dense=dense)
  assert m * d == pytest.approx(1e21, rel=1e-3)


def test_clark_takes_logarithms_to_base_ten():
  """At E = 1 and N = 1e9 it nearly meets the paper's dense law, (3.568e13/N)^0.078."""
  value = float(laws.Clark().predict(N=1e9, E=1))
  assert value == pytest.approx(2.285, abs=5e-4)
  assert value == pytest.approx((3.568e13 / 1e9) ** 0.078, rel=0.01)


@pytest.mark.parametrize(
  ("router", "published"), [("s_base", 937e9), ("rl_r", 85e9), ("hash", 83e9)]
)
def test_clarks_cutoff_is_the_published_one_within_the_rounding_of_c(router, published):
  """10^(-b/c) with c half a unit of its third decimal away encloses the paper's N."""
  law = laws.Clark.published(router)
  low = dataclasses.replace(law, c=law.c + 5e-4).cutoff
  high = dataclasses.replace(law, c=law.c - 5e-4).cutoff
  assert low < published < high


def test_above_the_cutoff_more_experts_raise_clarks_loss():
  """The sign of dL/dE changes at 10^(-b/c), whatever E."""
  law = laws.Clark()
  for n, sign in ((law.cutoff / 3, -1), (law.cutoff * 3, 1)):
    change = law.formula(N=n, E=64) - law.formula(N=n, E=8)
    assert math.copysign(1, change) == sign


INSIDE = {
  laws.PowerLaw: dict(C=1e20),
  laws.Chinchilla: dict(N=1e9, D=2e10),
  laws.Clark: dict(N=3e8, E=16.0),
  laws.Krajewski: dict(N=1e9, D=5e10, G=4.0),
  laws.Abnar: dict(N=2e9, D=3e10),
  laws.Ludziejewski: dict(N=5e8, D=2e10, E=8.0),
}


@pytest.mark.parametrize("law", INSIDE, ids=lambda law: law.__name__)
def test_every_input_lowers_the_loss_within_the_fitted_range(law):
  """More parameters, data, experts or granularity never hurt there."""
  where = INSIDE[law] | ({"S": 0.5} if law is laws.Abnar else {})
  base = law().formula(**where)
  for name, value in INSIDE[law].items():
    assert law().formula(**where | {name: 1.2 * value}) < base, name


def test_sparsity_pays_with_size_in_abnars_law():
  """At equal total N sparser is worse, and costs less the larger the model is."""
  law = laws.Abnar()
  cost = [
    law.formula(N=n, D=1e11, S=0.9) - law.formula(N=n, D=1e11, S=0) for n in (1e9, 1e11)
  ]
  assert cost[0] > cost[1]
  assert cost[0] > 0


def test_effective_experts_start_at_e_start_and_end_at_e_max():
  """E = 1 gives E_start and E without bound E_max, in Clark's and Ludziejewski's laws."""
  from moejax.sweep.laws.law import effective_experts

  assert effective_experts(1, 2.0732, 290.4521) == pytest.approx(2.0732)
  assert effective_experts(1e12, 2.0732, 290.4521) == pytest.approx(290.4521)


def test_a_prediction_outside_of_the_fitted_range_warns_and_says_which():
  """One warning names every input; inside there is none."""
  law = laws.Ludziejewski()
  with pytest.warns(laws.OutsideFittedRange, match="N = 4e[+]09.*E = 64 is outside.*32"):
    law.predict(N=4e9, D=1e10, E=64)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert law.predict(N=[1e8, 1e9], D=1e10, E=32).shape == (2,)


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda: laws.Ludziejewski().predict(N=1, D=1), "also needs E: experts"),
    (lambda: laws.Abnar().predict(N=1, D=1, E=1), "no input E"),
    (lambda: laws.Chinchilla().predict(N=math.nan, D=1), "N must be finite"),
    (lambda: laws.Clark().optimum(1e20, E=8), "no optimum"),
    (lambda: laws.Chinchilla().optimum(-1), "budget=-1"),
    (lambda: laws.Abnar().optimum(1e20, S=0.5), "Pass flops_per_token="),
    (lambda: laws.Clark.published("sinkhorn"), "not in table 3"),
    (lambda: laws.by_name("chinchila"), "Did you mean chinchilla?"),
  ],
)
def test_a_mistake_is_named(call, words):
  with pytest.raises(UserError, match=words.replace("?", "[?]")):
    call()


def model(**moe) -> Config:
  """Two blocks of width 64, GELU, every layer MoE, D_ff = 256; V = 264 bytes, untied."""
  config = Config()
  config.model.num_layers, config.model.width, config.model.hidden = 2, 64, 256
  config.model.tie_embeddings = False
  config.moe.every, config.moe.offset, config.moe.hidden = 1, 0, 256
  config.train.num_steps, config.train.batch_size = 10, 4
  config.data.sequence_length = 32
  for name, value in moe.items():
    setattr(config.moe, name, value)
  return config


TOKENS = 10 * 4 * 32


def test_krajewskis_n_is_eight_e_plus_four_width_squared_a_block():
  """Their count of a block: 4 d^2 of attention and E experts of 8 d^2; G splits them."""
  config = model(num_experts=16, segments=4, num_selected=1)
  inputs = definitions.inputs_of(laws.Krajewski, config)
  assert inputs == {"N": (8 * 16 + 4) * 64**2 * 2, "D": TOKENS, "G": 4}
  assert definitions.expansion(config) == 16


def test_clarks_n_is_the_model_with_one_expert():
  """12 d^2 a block, two tables of V d, 2 norms of d a block and one at the end."""
  inputs = definitions.inputs_of(laws.Clark, model(num_experts=16))
  assert inputs == {"N": 2 * 12 * 64**2 + 2 * 264 * 64 + 5 * 64, "E": 16}


def test_abnars_n_is_everything_and_s_counts_experts():
  """32 fine experts of half the width, 4 of which a token uses: S = 28/32."""
  inputs = definitions.inputs_of(
    laws.Abnar, model(num_experts=16, segments=2, num_selected=2)
  )
  blocks = 2 * ((8 * 16 + 4) * 64**2 + 64 * 32)
  assert inputs == {"N": blocks + 2 * 264 * 64 + 5 * 64, "D": TOKENS, "S": 28 / 32}


def test_ludziejewskis_e_is_the_ratio_of_all_to_active_experts():
  """K of 2 among 16 is E = 8, and N counts two experts of 8 d^2 a block."""
  inputs = definitions.inputs_of(laws.Ludziejewski, model(num_experts=16, num_selected=2))
  active = 2 * ((8 * 2 + 4) * 64**2 + 64 * 16) + 2 * 264 * 64 + 5 * 64
  assert inputs == {"N": active, "D": TOKENS, "E": 8}
  dense = definitions.inputs_of(laws.Ludziejewski, model(dense_twin=True))
  assert dense["E"] == 1


def test_lings_g_is_half_of_krajewskis_and_its_c_leaves_out_the_head():
  """d_expert = 128: G is 2 * 64 / 128 here and 256 / 128 there."""
  config = model(num_experts=16, segments=2, num_selected=1, num_shared=1)
  inputs = definitions.inputs_of(laws.Ling, config)
  assert inputs["G"] == 1
  assert definitions.inputs_of(laws.Krajewski, config)["G"] == 2
  assert inputs["A"] == (2 + 1) / (32 + 1)
  head = 6 * 264 * 64
  assert inputs["C"] == pytest.approx(
    (flops.flops_per_token(config, 264)["total"] - head) * TOKENS
  )


DOCS = pathlib.Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize(
  "law", [laws.Clark, laws.Krajewski, laws.Abnar, laws.Ludziejewski, laws.Ling]
)
def test_the_docs_count_the_default_config(law):
  """The default's steps have changed before, and the page did not notice."""
  inputs = definitions.inputs_of(law, default.get_config())
  exact = {name for name in inputs if name in "ND"}
  words = ", ".join(
    f"{name} {value:,.0f}" if name in exact else f"{name} {value:.3g}".replace("e+", "e")
    for name, value in inputs.items()
  )
  page = (DOCS / "sweeps_laws.md").read_text(encoding="utf-8")
  assert f"| {law.__name__} | {words} |" in page


@pytest.mark.parametrize("law", [laws.PowerLaw, laws.Chinchilla])
def test_general_laws_take_the_exact_counts(law):
  """C is the head's FLOPs too; N is the active count."""
  inputs = definitions.inputs_of(law, model(num_experts=16))
  total = flops.flops_per_token(model(num_experts=16), 264)["total"]
  expected = {"C": total * TOKENS} if law is laws.PowerLaw else {"D": TOKENS}
  assert expected.items() <= inputs.items()


@pytest.mark.parametrize(
  ("law", "moe", "words"),
  [
    (laws.Clark, dict(num_selected=2), "num_selected=2"),
    (laws.Clark, dict(num_shared=1), "num_shared=1"),
    (laws.Krajewski, dict(dense_twin=True), "dense_twin"),
  ],
)
def test_a_config_that_a_law_does_not_cover_is_refused(law, moe, words):
  with pytest.raises(ConfigError, match=words):
    definitions.inputs_of(law, model(**moe))
