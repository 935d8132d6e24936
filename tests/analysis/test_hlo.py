"""What a step starts is counted as XLA writes it: nothing twice, no mere name, and loops as often as they turn."""

import pytest

from cnn_jax.analysis.hlo import count_step

GPU = """HloModule jit_run, is_scheduled=true

%gemm (p.0: bf16[4,8], p.1: bf16[8,2]) -> f32[4,2] {
  %p.0 = bf16[4,8]{1,0} parameter(0)
  %p.1 = bf16[8,2]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,2]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%add (a: f32[4,2]) -> (f32[4,2], f32[4,2]) {
  %a = f32[4,2]{1,0} parameter(0)
  %add.1 = f32[4,2]{1,0} add(%a, %a)
  ROOT %both = (f32[4,2]{1,0}, f32[4,2]{1,0}) tuple(%add.1, /*index=1*/%a)
}

%twice (s: (s32[], f32[4,2])) -> (s32[], f32[4,2]) {
  %s = (s32[], f32[4,2]{1,0}) parameter(0)
  %g = f32[4,2]{1,0} get-tuple-element(%s), index=1
  %halved = (f32[4,2]{1,0}, f32[4,2]{1,0}) fusion(%g), kind=kLoop, calls=%add
  ROOT %t = (s32[], f32[4,2]{1,0}) tuple(%g, %g)
}

%below (s: (s32[], f32[4,2])) -> pred[] {
  %s = (s32[], f32[4,2]{1,0}) parameter(0)
  ROOT %c = pred[] fusion(%s), kind=kLoop, calls=%add
}

%quiet (x: f32[4,2]) -> f32[4,2] {
  ROOT %x = f32[4,2]{1,0} parameter(0)
}

%loud (x: f32[4,2]) -> f32[4,2] {
  %x = f32[4,2]{1,0} parameter(0)
  %copy.9 = f32[4,2]{1,0} copy(%x)
  ROOT %copy.8 = f32[4,2]{1,0} copy(%copy.9)
}

%step (s: (s32[], f32[4,2])) -> (s32[], f32[4,2]) {
  %s = (s32[], f32[4,2]{1,0}, /*index=2*/f32[2]{0:T(128)S(1)}) parameter(0)
  %g.0 = bf16[4,8]{1,0} get-tuple-element(%s), index=1, metadata={op_name="jit(f)/dot(x)/convolution("}
  %bitcast.1 = bf16[4,8]{1,0} bitcast(%g.0)
  %product = f32[4,2]{1,0} fusion(%bitcast.1, %g.0), kind=kCustom, calls=%gemm, backend_config={"kind":"__triton_gemm"}
  %conv = (f32[4,2]{1,0}, u8[0]{0}) custom-call(%g.0, %product), dim_labels=b01f_o01i->b01f, feature_group_count=GROUPS, custom_call_target="__cudnn$convForward"
  %lt = (f32[4,2]{1,0}, s8[64]{0}) custom-call(%g.0, %product), custom_call_target="__cublas$lt$matmul"
  %note = f32[4,2]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %adam = (f32[4,2]{1,0}, f32[4,2]{1,0}) fusion(%product), kind=kLoop, calls=%add
  %sum-start = f32[4,2]{1,0} all-reduce-start(%product), replica_groups={{0,1}}, to_apply=%add
  %sum-done = f32[4,2]{1,0} all-reduce-done(%sum-start)
  %inner = (s32[], f32[4,2]{1,0}) while(%adam), condition=%below, body=%twice, backend_config={"known_trip_count":{"n":"3"}}
  %choice = f32[4,2]{1,0} conditional(%c, %product, %product), branch_computations={%quiet, %loud}
  %graph = f32[4,2]{1,0} call(%product), to_apply=%loud
  ROOT %t = (s32[], f32[4,2]{1,0}) tuple(%g.0, %inner)
}

%seeds (s: (s32[], f32[4,2])) -> (s32[], f32[4,2]) {
  %s = (s32[], f32[4,2]{1,0}) parameter(0)
  %c.1 = f32[4,2]{1,0} copy(%s)
  %c.2 = f32[4,2]{1,0} copy(%s)
  ROOT %steps = (s32[], f32[4,2]{1,0}) while(%s), condition=%below, body=%stepKNOWN
}

ENTRY %main (s: (s32[], f32[4,2])) -> (s32[], f32[4,2]) {
  %s = (s32[], f32[4,2]{1,0}) parameter(0)
  ROOT %while.1 = (s32[], f32[4,2]{1,0}) while(%s), condition=%below, body=%seeds, backend_config={"known_trip_count":{"n":"32"}}
}
"""  # noqa: E501
KNOWN = ', backend_config={"known_trip_count":{"n":"600"},"known_init_step":{"init":"0","step":"1"}}'

TPU = """HloModule jit_run, is_scheduled=true

%fused (p.0: f32[4,8], p.1: f32[8,2]) -> f32[4,2] {
  %p.0 = f32[4,8]{1,0:T(8,128)S(1)} parameter(0)
  %p.1 = f32[8,2]{1,0:T(8,128)} parameter(1)
  %k = f32[4,2]{1,0} convolution(%p.0, %p.1), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, batch_group_count=2, metadata={op_name="jit(f)/while/body/conv_general_dilated"}
  ROOT %c = f32[4,2]{1,0:T(8,128)} convolution(%p.0, %k), dim_labels=bf_io->bf, metadata={op_name="jit(f)/while/body/jvp()/dot_general" stack_frame_id=4}
}

%step (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %s = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %g = f32[4,8]{1,0:T(8,128)} get-tuple-element(%s), index=1
  %i = s32[100]{0:T(128)} iota(), iota_dimension=0
  %n = s32[]{:T(128)} add(%i, %i)
  %near = (f32[4,8]{1,0:T(8,128)S(1)}, f32[4,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%g)
  %here = f32[4,8]{1,0:T(8,128)S(1)} copy-done(%near)
  %away = (f32[4,8]{1,0:T(8,128)S(5)}, f32[4,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%g)
  %products = f32[4,2]{1,0:T(8,128)} fusion(%here, %g), kind=kOutput, calls=%fused
  ROOT %t = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%n, %g)
}

%below (s: (s32[], f32[4,8])) -> pred[] {
  %s = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %g.1 = s32[]{:T(128)} get-tuple-element(%s), index=0
  %bound = s32[]{:T(128)} BOUND
  ROOT %lt = pred[]{:T(512)} compare(%g.1, %bound), direction=LT
}

ENTRY %main.4 (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %s = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  ROOT %while = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) while(%s), condition=%below, body=%step
}
"""  # noqa: E501


def test_the_step_of_a_gpu_is_what_the_loop_with_the_products_starts():
    step = count_step(GPU.replace("GROUPS", "1").replace("KNOWN", KNOWN), host_decides=True)
    # gemm, cuDNN, cuBLAS, Adam and the all-reduce; the inner loop's fusion three times; two copies of the choice's
    # larger branch, and two in the call.
    assert step.launches == 5 + 3 + 2 + 2
    assert (step.convolutions, step.grouped_convolutions, step.matmuls) == (1, 0, 2)
    assert step.collectives == 1
    assert step.host_transfers == 1  # which branch to take
    assert step.known_trip_count


def test_a_loop_of_unknown_length_is_asked_of_the_host_after_every_step():
    text = GPU.replace("GROUPS", "1").replace("KNOWN", "")
    step = count_step(text, host_decides=True)
    assert not step.known_trip_count
    assert step.host_transfers == 2
    assert count_step(text, host_decides=False).host_transfers == 0


def test_of_a_single_step_which_needs_no_loop_the_whole_program_counts():
    text = GPU.replace("GROUPS", "1").replace("KNOWN", KNOWN)
    in_a_loop = count_step(text, host_decides=True)
    # The step's computation takes the place of the program that runs it in a loop.
    before = text.partition("ENTRY ")[0]
    unrolled = before.replace("\n%step ", "\nENTRY %step ")
    assert unrolled != before
    assert count_step(unrolled, host_decides=True) == in_a_loop


def test_a_convolution_of_several_groups_is_told():
    assert count_step(GPU.replace("GROUPS", "32").replace("KNOWN", KNOWN), host_decides=True).grouped_convolutions == 1


@pytest.mark.parametrize(("bound", "known"), [("constant(600)", True), ("get-tuple-element(%s), index=1", False)])
def test_the_step_of_a_tpu_has_products_of_matrices_that_are_written_as_convolutions(bound, known):
    step = count_step(TPU.replace("BOUND", bound), host_decides=False)
    assert step.launches == 4  # the sum, two copies and the fusion
    assert (step.convolutions, step.grouped_convolutions, step.matmuls) == (1, 1, 1)
    assert (step.collectives, step.host_transfers) == (0, 1)  # a copy to the host's memory
    assert step.known_trip_count == known
