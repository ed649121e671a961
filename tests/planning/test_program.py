"""Programs that the TPU's and CUDA's compilers made of one function: six layers of 512 x 512, split over four chips, gathered
within a scan, and the gradient split again. Their texts are whole but for metadata and most of the configuration."""

import pathlib

import pytest

from lumos_jax.planning import program, read_program

TEXTS = pathlib.Path(__file__).parent / "programs"
KERNEL = 512 * 512 * 2  # bytes of one layer's, in bfloat16


@pytest.fixture(params=["v5e", "h100"])
def text(request):
    return request.param, (TEXTS / f"{request.param}_scan.hlo").read_text()


def test_loops_and_collectives_of_real_programs(text):
    name, read = text[0], read_program(text[1], 4)
    assert sorted(read.trips.values()) == [6, 6]
    # Each layer is gathered in the forward and in the backward pass; three quarters of it come from elsewhere.
    gathered = read.collectives["all-gather"]
    assert (gathered.count, gathered.received) == (12, 12 * 0.75 * KERNEL)
    scattered = read.collectives["reduce-scatter"]  # the TPU writes it as all-reduce and slice
    assert (scattered.count, scattered.received) == (6, 6 * 0.75 * KERNEL)
    assert read.received == 18 * 0.75 * KERNEL
    # The TPU's compiler found nothing to compute beside any of them.
    assert read.exposed == (read.received if name == "v5e" else 0)
    assert (read.cycles > 0) == (name == "v5e")


def test_cycles_count_once_a_trip():
    text = (TEXTS / "v5e_scan.hlo").read_text()
    once = sum(int(n) for n in program._CYCLES.findall(text))
    read = read_program(text, 4)
    assert once < read.cycles < 6 * once  # most of it is in the two loops
    longer = read_program(text.replace("constant(6)", "constant(12)"), 4)
    assert longer.collectives["all-gather"].count == 24
    outside = 2 * read.cycles - longer.cycles
    assert 0 < outside < once


HEAD = "HloModule m\n\n%body (p: (s32[])) -> (s32[]) {{\n{body}\n}}\n\n%cond (p: (s32[])) -> pred[] {{\n{cond}\n}}\n\n"
ENTRY = "ENTRY %main (a: s32[]) -> s32[] {{\n  %w = (s32[]) while(%t), condition=%cond, body=%body{more}\n}}\n"


def loop(cond, more=""):
    body = '  %f = f32[8]{0} fusion(%p), kind=kLoop, calls=%g, backend_config={"estimated_cycles":"10"}'
    return (HEAD + ENTRY).format(body=body, cond=cond, more=more)


def test_trip_counts():
    compare = "  %c = s32[] constant(7)\n  %one = s32[] constant(1)\n  ROOT %l = pred[] compare(%i, %c), direction=LT"
    assert read_program(loop(compare), 1).cycles == 70
    told = ', backend_config={"known_trip_count":{"n":"5"}}'
    assert read_program(loop(compare, told), 1).cycles == 50
    unknown = "  ROOT %l = pred[] compare(%i, %j), direction=LT"
    read = read_program(loop(unknown), 1)
    assert (read.cycles, read.trips) == (10, {"body": None})


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("all-gather(%x), replica_groups=mesh['axis_0'=2,'axis_1'=16,'axis_2'=1] {'axis_1'}, dimensions={0}", 16),
        ("all-reduce(%x), replica_groups=mesh['axis_0'=4,'axis_1'=8] {'axis_0','axis_1'}", 32),
        ("all-reduce(%x), replica_groups=[16,4]<=[64], to_apply=%a", 4),
        ("all-reduce(%x), replica_groups={{0,2},{1,3}}, to_apply=%a", 2),
        ("all-reduce(%x), to_apply=%a", 64),
    ],
)
def test_groups(line, size):
    assert program.group_size(line, 64) == size


def test_sizes_of_shapes():
    assert program.size_of("(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, f32[], /*index=2*/pred[3])") == 2048 + 4 + 3
    assert program.size_of("f8e4m3fn[10]{0}") == 10
    assert program.size_of("s4[10]{0}") == 5


def test_pieces_of_one_collective_count_once_and_what_is_synchronous_is_exposed():
    text = """HloModule m

%piece.1 (p: bf16[64]) -> bf16[256] {
  ROOT %g.1 = bf16[256]{0} all-gather(%p), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
}

%piece.2 (p: bf16[64]) -> bf16[256] {
  ROOT %g.2 = bf16[256]{0} all-gather(%p), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
}

ENTRY %main (a: bf16[64]) -> bf16[256] {
  %f.1 = bf16[256]{0} fusion(%a), kind=kOutput, calls=%piece.1
  %f.2 = bf16[256]{0} fusion(%a), kind=kOutput, calls=%piece.2
  ROOT %r = bf16[256]{0} all-reduce(%f.2), channel_id=4, replica_groups=[1,4]<=[4], to_apply=%add
}
"""
    read = read_program(text, 4)
    assert read.collectives["all-gather"] == program.Collective(1, 0.75 * 512, 0)
    assert read.collectives["all-reduce"] == program.Collective(1, 2 * 0.75 * 512, 2 * 0.75 * 512)


def test_collectives_of_shard_map_share_a_channel_and_kernels_say_what_they_cost():
    text = """HloModule m

%piece.1 (p: bf16[64]) -> bf16[256] {
  ROOT %g.1 = bf16[256]{0} all-gather(%p), channel_id=1, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="0"}
}

%piece.2 (p: bf16[64]) -> bf16[256] {
  ROOT %g.2 = bf16[256]{0} all-gather(%p), channel_id=1, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="1"}
}

ENTRY %main (a: bf16[64]) -> bf16[256] {
  %f.1 = bf16[256]{0} fusion(%a), kind=kOutput, calls=%piece.1
  %f.2 = bf16[256]{0} fusion(%a), kind=kOutput, calls=%piece.2
  %g.3 = bf16[256]{0} all-gather(%a), channel_id=1, replica_groups=[1,4]<=[4], frontend_attributes={async_collective_name="s"}
  ROOT %k = bf16[256]{0} custom-call(%g.3), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{\
"cost_estimate":{"flops":"30","transcendentals":"1","bytes_accessed":"70","remote_bytes_transferred":"0"}}}
}
"""
    read = read_program(text, 4)
    # Two of them run within fusions; the third was to be asynchronous and is not.
    assert read.collectives["all-gather"] == program.Collective(3, 3 * 0.75 * 512, 0.75 * 512)
    assert read.kernels == (program.Kernel(1, 30, 70),)


def test_a_piece_of_a_reduce_scatter_in_another_fusion_counts_once():
    text = """HloModule m

%all-reduce-scatter.1 (p: bf16[256]) -> bf16[256] {
  ROOT %r.1 = bf16[256]{0} all-reduce(%p), channel_id=3, replica_groups=[1,4]<=[4], to_apply=%add
}

%piece.2 (p: bf16[256]) -> bf16[256] {
  ROOT %r.2 = bf16[256]{0} all-reduce(%p), channel_id=3, replica_groups=[1,4]<=[4], to_apply=%add
}

ENTRY %main (a: bf16[256]) -> bf16[256] {
  %f.1 = bf16[256]{0} fusion(%a), kind=kOutput, calls=%all-reduce-scatter.1
  ROOT %f.2 = bf16[256]{0} fusion(%f.1), kind=kOutput, calls=%piece.2, backend_config={"estimated_cycles":"9"}
}
"""
    read = read_program(text, 4)
    assert read.collectives["all-reduce"] == program.Collective(1, 2 * 0.75 * 512, 2 * 0.75 * 512)
    assert read.overlapped == ()


def test_asynchronous_collectives_that_share_a_channel_count_each():
    """As those of unrolled layers on GPUs do, where `shard_map` gives all of them one."""
    one = "all-gather-start(%a), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}"
    text = f"""HloModule m

ENTRY %main (a: bf16[64]) -> bf16[256] {{
  %g.1 = (bf16[64]{{0}}, bf16[256]{{0}}) {one}
  %d.1 = bf16[256]{{0}} all-gather-done(%g.1)
  %g.2 = (bf16[64]{{0}}, bf16[256]{{0}}) {one}
  ROOT %d.2 = bf16[256]{{0}} all-gather-done(%g.2)
}}
"""
    assert read_program(text, 4).collectives["all-gather"] == program.Collective(2, 2 * 0.75 * 512, 0)


def test_what_runs_beside_a_collective_of_another_core():
    """As the SparseCores of v5p and v6e run them: in a computation of their own, all on one channel."""
    gather = "all-gather(%p), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}"
    start = 'call-start(%a), async_execution_thread="sparsecore"'
    text = f"""HloModule m

%called.1 (p: bf16[64]) -> bf16[256] {{
  ROOT %g.1 = bf16[256]{{0}} {gather}
}}, execution_thread="sparsecore"

%called.2 (p: bf16[64]) -> bf16[256] {{
  ROOT %g.2 = bf16[256]{{0}} {gather}
}}, execution_thread="sparsecore"

ENTRY %main (a: bf16[64]) -> bf16[256] {{
  %s.1 = ((bf16[64]{{0}}), bf16[256]{{0}}) {start}, to_apply=%called.1
  %x = bf16[64]{{0}} add(%a, %a), backend_config={{"estimated_cycles":"70"}}
  %d.1 = bf16[256]{{0}} call-done(%s.1)
  %s.2 = ((), (), (s32[1]{{0}})) call-start(), async_execution_thread="sparsecore", to_apply=%called.2
  %y = bf16[64]{{0}} add(%x, %x), backend_config={{"estimated_cycles":"10"}}
  %u.2 = ((bf16[64]{{0}}), bf16[256]{{0}}) call-update(%s.2, %y)
  %z = bf16[64]{{0}} add(%x, %y), backend_config={{"estimated_cycles":"20"}}
  ROOT %d.2 = bf16[256]{{0}} call-done(%u.2)
}}
"""
    read = read_program(text, 4)
    assert read.cycles == 100
    assert read.collectives["all-gather"] == program.Collective(2, 2 * 0.75 * 512, 0)
    # The second gets its operand, which libtpu 0.0.50 writes so, after the start.
    assert read.overlapped == (program.Overlapped(1, 0.75 * 512, 70), program.Overlapped(1, 0.75 * 512, 20))


def test_other_texts_are_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        read_program("module @jit_step {}", 4)
