"""FLOPs counted in an optimised program, against what the mathematics says."""

import jax
import jax.numpy as jnp
import pytest

from moejax.hlo import parse as hlo
from moejax.hlo.flops import Instruction, flops_of


def count(function, *shapes: tuple[int, ...]) -> float:
  arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  text = jax.jit(function).lower(*arrays).compile().as_text()
  assert text is not None
  return hlo.Program(text).flops()


def test_products():
  """Plain, batched and contracted over two dimensions: two per multiply-add."""
  assert count(lambda a, b: a @ b, (24, 32), (32, 40)) == 2 * 24 * 32 * 40
  batched = count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (3, 24, 32), (3, 32, 8))
  assert batched == 2 * 3 * 24 * 32 * 8
  both = count(lambda a, b: jnp.einsum("ijk,jkl->il", a, b), (24, 4, 8), (4, 8, 16))
  assert both == 2 * 24 * 32 * 16


def test_a_loop_counts_each_turn():
  """What the compiler's own analysis counts once runs as often as the loop turns."""

  def scanned(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

  assert count(scanned, (64, 128), (7, 128, 128)) == 7 * 2 * 64 * 128 * 128


def test_gradients_and_recomputation():
  """A product has two more behind it, and one more again where it is recomputed."""

  def loss(x, w, *, again: bool):
    def layer(x, w):
      return jnp.tanh(x @ w)

    step = jax.checkpoint(layer) if again else layer
    return jnp.sum(jax.lax.scan(lambda x, w: (step(x, w), None), x, w)[0])

  one = 5 * 2 * 64 * 128 * 128
  for again, times in ((False, 3), (True, 4)):
    grad = jax.grad(lambda x, w, again=again: loss(x, w, again=again), argnums=(0, 1))
    assert count(grad, (64, 128), (5, 128, 128)) == times * one


CONVOLUTIONS = {
  # A plain product, as a TPU writes it.
  "f32[8,4096,8]{1,2,0} convolution(%a, %b), window={size=1}, dim_labels=0bf_io0->0bf": (
    {"a": "f32[8,4096,512]", "b": "f32[512,8,1]"},
    2 * 8 * 4096 * 512 * 8,
  ),
  # [B,S,D] with [D,H,A]: heads are a window that meets its operand once each.
  "bf16[8,4096,32,128] convolution(%a, %b), "
  "window={size=1x32 pad=0_0x31_31 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f": (
    {"a": "bf16[8,4096,512,1]", "b": "bf16[512,32,128,1]"},
    2 * 8 * 4096 * 32 * 128 * 512,
  ),
  # A gradient of weights: the batch is contracted as a window over all of it.
  "bf16[512,256,1] convolution(%a, %b), window={size=8}, dim_labels=0fb_0io->bf0": (
    {"a": "bf16[8,64,512]", "b": "bf16[8,64,256]"},
    2 * 8 * 64 * 512 * 256,
  ),
}


@pytest.mark.parametrize("text", CONVOLUTIONS)
def test_products_as_a_tpu_writes_them(text):
  """Every product there is a convolution, and batch dimensions are windows."""
  shapes, want = CONVOLUTIONS[text]
  shape, _, rest = text.partition(" convolution(")
  assert flops_of(Instruction("c", shape, "convolution", rest), shapes) == want


def test_kernels():
  """A kernel's own count, cut to the rows that exist; attention's by its blocks."""
  rest = (
    '%x, %w), custom_call_target="tpu_custom_call", backend_config='
    '{"custom_call_config":{"cost_estimate":{"flops":"1000","transcendentals":"0"}}}'
  )
  ragged = Instruction("ragged-dot-none.7", "bf16[80,16]", "custom-call", rest)
  assert flops_of(ragged, {}, 0.8) == 800
  assert flops_of(Instruction("other", "bf16[8]", "custom-call", rest), {}, 0.8) == 1000
  rest = (
    '%a, %q), custom_call_target="tpu_custom_call", operand_layout_constraints='
    "{s8[1,8,8]{2,1,0}, bf16[2,4,4096,128]{3,2,1,0}, bf16[2,1,4096,128]{3,2,1,0}, "
    "bf16[2,1,4096,64]{3,2,1,0}, s32[2,4096,128]{2,1,0}}, "
    'frontend_attributes={kernel_metadata={ "xprof_metadata":'
    '"{\\"block_q\\": 512, \\"block_q_dq\\": 1024}" }}'
  )
  # Keys of 128 numbers, values of 64: a product over values is half of one over keys.
  square = 2 * 2 * 4 * 4096 * 4096 * 128
  forward = Instruction("splash_mha_fwd.3", "(f32[1], bf16[2])", "custom-call", rest)
  assert flops_of(forward, {}) == 1.5 * square * 9 / 16
  back = Instruction("splash_mha_dq.3", "(f32[1], bf16[2])", "custom-call", rest)
  assert flops_of(back, {}) == 2.5 * square * 5 / 8


def test_attention_of_a_gpu_library():
  """CuDNN's kernel computes every block: two products forward, five backward."""
  rest = (
    '%q, %k), custom_call_target="__cudnn$fmhaScaleBiasSoftmax{}", '
    "operand_layout_constraints={{bf16[1,4096,32,128]{{3,2,1,0}}, bf16[1,4096,8,128]}}"
  )
  for name, products in (("", 2), ("Backward", 5)):
    call = Instruction("f", "(bf16[1])", "custom-call", rest.format(name))
    assert flops_of(call, {}) == products * 2 * 4096 * 32 * 128 * 4096


def test_a_peeled_loop_turns_once_less():
  """Where the compiler took the first turn out, the loop begins at one."""
  text = """HloModule step
%condition (p: (s32[], f32[8,16])) -> pred[] {
  %p = (s32[], f32[8,16]) parameter(0)
  %bound = s32[] constant(32)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}
%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %x = f32[8,16] parameter(0)
  %w = f32[16,16] parameter(1)
  ROOT %d = f32[8,16] dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
ENTRY %main (x: f32[8,16]) -> f32[8,16] {
  %one = s32[] constant(START)
  %copy.1 = s32[] copy(%one)
  %x = f32[8,16] parameter(0)
  %tuple.1 = (s32[], f32[8,16]) tuple(%copy.1, %x)
  ROOT %loop = (s32[], f32[8,16]) while(%tuple.1), condition=%condition, body=%body
}
"""
  one = 2 * 8 * 16 * 16
  for start in (0, 1):
    program = hlo.Program(text.replace("START", str(start)))
    assert program.flops() == (32 - start) * one


def test_one_branch_of_a_conditional_counts():
  """The longer of two, as a device runs one of them: 2*8*16*16 and nothing besides."""
  branch = """%NAME (p: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16] parameter(0)
  %w = f32[16,16] parameter(1)
  ROOT %d = f32[8,16] dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
  text = "HloModule step\n" + "".join(branch.replace("NAME", n) for n in ("a", "b"))
  text += """ENTRY %main (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16] parameter(0)
  %i = s32[] constant(0)
  ROOT %c = f32[8,16] conditional(%i, %x, %x), branch_computations={%a, %b}
}
"""
  assert hlo.Program(text).flops() == 2 * 8 * 16 * 16


def test_what_goes_between_slices():
  """A transfer that the runtime takes to the other slice is a collective over the axis
  that crosses them, and is told apart."""
  text = """HloModule step
ENTRY %main (x: bf16[256,8]) -> bf16[256,8] {
  %x = bf16[256,8] parameter(0)
  %send.1 = (bf16[256,8], u32[], token[]) send(%x, %t), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name=\
"xla_megascale_runtime",_xla_megascale_target="{1,2}x{0:63}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""
  [found] = hlo.Program(text).collectives(("data", "fsdp"), (1, 64), "data")
  assert (found.kind, found.axis, found.across) == ("all-reduce", "data", True)
  assert found.bytes == found.wire_bytes == 256 * 8 * 2


TPU_PROGRAM = """HloModule step
%fused (p: f32[4096,8]) -> f32[256,8] {
  %input.1 = f32[4096,8]{1,0} parameter(0)
}
%all-reduce-scatter.2 (input.1: f32[4096,8]) -> f32[256,8] {
  %input.1 = f32[4096,8]{1,0} parameter(0)
  ROOT %all-reduce.9 = f32[4096,8]{1,0} all-reduce(%input.1), \
replica_groups={{0,1},{2,3}}, to_apply=%add
}
ENTRY %main (p: bf16[64,2]) -> f32[256,8] {
  %rows = bf16[64,2,8]{2,1,0} parameter(0)
  %room = bf16[80,2,8]{2,1,0} parameter(1)
  %kernel.3 = f32[4096,8]{1,0} custom-call(%rows), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(step)/pallas_call"}
  %ragged.1 = bf16[80,2,8]{2,1,0} ragged-all-to-all(%rows, %room, %a, %b), \
replica_groups={{0,2},{1,3}}
  ROOT %f = f32[256,8]{1,0} fusion(%kernel.3), kind=kCustom, calls=%all-reduce-scatter.2
}
"""


def test_a_tpu_program():
  """A kernel's metadata breaks its line and hides nothing behind it; a reduce-scatter
  that is written as an all-reduce is told; of a ragged exchange what is sent counts."""
  found = hlo.Program(TPU_PROGRAM).collectives(("expert", "fsdp"), (2, 2))
  assert [(c.kind, c.axis, c.bytes, c.wire_bytes) for c in found] == [
    ("ragged-all-to-all", "expert", 64 * 16 * 2, 64 * 16),
    ("reduce-scatter", "fsdp", 4096 * 8 * 4, 4096 * 8 * 2),
  ]
