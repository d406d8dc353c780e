"""Parts of a program's instructions, from its text."""

import jax
import jax.numpy as jnp
import pytest

from moejax import parts
from moejax.hlo.parse import Program
from moejax.hlo.parts import Label, collectives, control, is_mixed, label_of, labels

# ruff: noqa: E501
TEXT = """
HloModule jit_step

%fused (p0: f32[8,4], p1: f32[8,4]) -> f32[8,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %p1 = f32[8,4]{1,0} parameter(1)
  %mul = f32[8,4]{1,0} multiply(%p0, %p1), metadata={op_name="jit(step)/jvp(moejax_experts)/mul"}
  %sum = f32[8]{0} reduce(%mul), metadata={op_name="jit(step)/jvp(moejax_norm)/reduce"}
  ROOT %add = f32[8,4]{1,0} add(%mul, %p1), metadata={op_name="jit(step)/jvp(moejax_norm)/add"}
}

%body (p: (f32[8,4])) -> (f32[8,4]) {
  %p = (f32[8,4]{1,0}) parameter(0)
  %item = f32[8,4]{1,0} get-tuple-element(%p), index=0
  %tanh = f32[8,4]{1,0} tanh(%item), metadata={op_name="jit(step)/transpose(jvp(moejax_head))/while/body/tanh"}
  ROOT %out = (f32[8,4]{1,0}) tuple(%tanh)
}

%cond (p: (f32[8,4])) -> pred[] {
  %q = (f32[8,4]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (a: f32[8,4], b: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[8,4]{1,0} parameter(1)
  %fusion = f32[8,4]{1,0} fusion(%a, %b), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/jvp(moejax_norm)/add"}
  %zeros = f32[8,4]{1,0} broadcast(%a), dimensions={}
  %start = (f32[8,4]{1,0}) tuple(%zeros)
  %while = (f32[8,4]{1,0}) while(%start), condition=%cond, body=%body
  %done = f32[8,4]{1,0} get-tuple-element(%while), index=0
  %all = f32[8,4]{1,0} all-reduce(%done), to_apply=%cond, metadata={op_name="jit(step)/moejax_optimizer/sum"}
  ROOT %copy = f32[8,4]{1,0} copy(%all)
}
"""


@pytest.fixture(scope="module")
def program() -> Program:
  return Program(TEXT)


def test_the_innermost_scope_decides_and_a_transpose_is_backward():
  deep = "jit(step)/transpose(jvp(moejax_dispatch))/moejax_experts/while/body/dot"
  assert label_of(deep) == Label("experts", True)
  assert label_of("jit(step)/jvp(moejax_head)/dot") == Label("head", False)
  assert label_of("jit(step)/rope/moejax_by_hand/experts/mul") is None


def test_a_fusion_is_split_by_what_its_instructions_write(program):
  """32 elements of the experts, 8 + 32 of the norm."""
  found = labels(program)["fusion"]
  assert found == {
    Label("experts", False): pytest.approx(32 / 72),
    Label("norm", False): pytest.approx(40 / 72),
  }
  assert is_mixed(found) and not is_mixed(labels(program)["tanh"])


def test_what_the_compiler_adds_belongs_to_what_it_serves(program):
  """A loop to its body, its first value to the loop, a copy to what it copies."""
  found = labels(program)
  head = {Label("head", True): 1.0}
  assert found["while"] == found["zeros"] == found["start"] == head
  assert found["copy"] == {Label("optimizer", False): 1.0}
  assert control(program) == {"while"} and collectives(program) == {"all"}


def test_scopes_of_a_real_program_survive_differentiation_and_compilation():
  """Forward and backward products of two parts, in a scan, by what XLA was left with."""

  def loss(w, x):
    def layer(x, w):
      with parts.scope(parts.ATTENTION):
        x = jnp.tanh(x @ w)
      return parts.of_part(parts.EXPERTS)(lambda y: jnp.sin(y @ w))(x), None

    return jnp.sum(jax.lax.scan(layer, x, w)[0])

  compiled = jax.jit(jax.grad(loss)).lower(jnp.ones((3, 64, 64)), jnp.ones((64, 64)))
  program = Program(compiled.compile().as_text() or "")
  found = labels(program)
  dots = {
    label
    for instructions in program.computations.values()
    for instruction in instructions
    if instruction.opcode == "dot"
    for label in found[instruction.name]
  }
  assert dots == {Label(p, b) for p in ("attention", "experts") for b in (False, True)}
