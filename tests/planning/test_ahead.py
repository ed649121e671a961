import importlib.util

import pytest

from lumos_jax.planning import ahead, parse_target

GIB = 2**30


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (28.00G) exceeds "
            "available HBM (15.75G).",
            28.0 * GIB,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.53G of 15.75G "
            "hbm. Exceeded hbm capacity by 4.78G.",
            20.53 * GIB,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 512.0M of 128.0M vmem.", None),
        ("INTERNAL: no tile sizes", None),
    ],
)
def test_what_a_program_would_have_needed(message, needed):
    assert ahead.needed_bytes(message) == needed


@pytest.mark.parametrize(("target", "extra"), [("v5e:2x2", r"'\.\[plan\]'"), ("h100:8", r"'\.\[plan-cuda\]'")])
def test_a_missing_compiler_is_named_with_its_extra(target, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=extra):
        ahead.devices_of(parse_target(target))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler is not installed")
def test_the_tpu_compiler_estimates_and_answers_for_memory():
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    target = parse_target("v5e:2x2")
    mesh = Mesh(np.array(ahead.devices_of(target)), ("x",))

    def array(side):
        return jax.ShapeDtypeStruct((side, side), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("x")))

    def power(x):
        return jax.lax.fori_loop(0, 10, lambda _, y: y @ x, x)

    small = ahead.compile_for(target, jax.jit(power).lower(array(1024)))
    least = 10 * 2 * 1024**3 / 4 / target.chip.peak  # seconds
    assert least < small.program.cycles / target.chip.clock < 4 * least
    assert small.program.received > 0
    large = ahead.compile_for(target, jax.jit(lambda x: (power(x), x.T @ x, jnp.sin(x) @ x)).lower(array(1 << 17)))
    assert large.program is None
    assert large.memory.total > target.chip.usable
