"""One of two processes that place a frozen parameter between them: python -m tests.train.placing PORT PROCESS"""

import sys

import jax
import numpy as np
import pytest

from lumos_jax import config
from lumos_jax.train import sharding


def main(port, process):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    place = sharding.Frozen(sharding.make_mesh(config.Mesh(fsdp=2)), 0)
    array = np.arange(24, dtype=np.float32).reshape(3, 8)
    split = place("kernel", array)
    assert len(split.addressable_shards) == 2, split.sharding
    assert {shard.data.shape for shard in split.addressable_shards} == {(3, 2)}
    whole = jax.jit(place.gather)(split)
    sharding.check_agreement({"encoder": "a@1"})
    with pytest.raises(ValueError, match="different frozen networks"):
        sharding.check_agreement({"encoder": f"a@{process}"})
    assert np.array_equal(np.asarray(whole.addressable_data(0)), array)
    print("placed")


if __name__ == "__main__":
    main(*sys.argv[1:])
