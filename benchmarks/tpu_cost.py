"""What the gradient of DiT-XL/2 costs on a TPU, by the TPU compiler alone: no TPU is needed.

    pip install libtpu
    python -m benchmarks.tpu_cost --topology=v5e:2x2 --batch=16 --remat=full

Compiles the gradient of a squared output, data parallel over the topology's chips, ahead of time, and prints FLOPs, bytes
touched, temporary memory and the compiler's own estimate of cycles (fusions of the layer scans counted once a layer). Run it in
two checkouts to see that a change made for another backend costs a TPU nothing.
"""

from __future__ import annotations

import argparse
import os
import re

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lumos_jax import config, models


def cycles(program: str, layers: int) -> int:
    """Estimated cycles of a compiled program's text: of its computations once, of the bodies of its scans once a layer."""
    total: dict[str, int] = {}
    current = ""
    for line in program.splitlines():
        if found := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = found[1]
        for number in re.findall(r'"estimated_cycles":"?(\d+)', line):
            total[current] = total.get(current, 0) + int(number)
    bodies = set(re.findall(r"body=%?([\w.\-]+)", program))
    return sum(count * (layers if name in bodies else 1) for name, count in total.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x2", help="as jax names it (v5e:2x2)")
    parser.add_argument("--batch", type=int, default=16, help="images a chip (16)")
    parser.add_argument("--remat", default="full", choices=("none", "dots", "full"))
    args = parser.parse_args()
    chips = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    mesh = jax.sharding.Mesh(np.array(chips), ("data",))
    model = config.Model(remat=args.remat, unroll=1)  # the default of unroll asks for the backend at hand, a CPU
    dit = models.make_dit(model, latent_shape=(32, 32, 4), out_channels=8, token_shape=(1, 768))
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def array(shape, sharding):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    def loss(params, x, t, tokens):
        return jnp.square(dit.apply(params, x, t, models.Condition(tokens=tokens))).mean()

    params = jax.tree.map(lambda leaf: array(leaf.shape, whole), jax.eval_shape(dit.init, jax.random.key(0)))
    size = args.batch * len(chips)
    inputs = (array((size, 32, 32, 4), rows), array((size,), rows), array((size, 1, 768), rows))
    compiled = jax.jit(jax.grad(loss)).lower(params, *inputs).compile()
    cost = compiled.cost_analysis()
    print(
        f"{args.topology}, {args.batch} images a chip, remat {args.remat}; a scan's body is counted once in FLOPs and bytes"
    )
    print(f"FLOPs            {cost['flops']:.4g}")
    print(f"bytes            {cost['bytes accessed']:.4g}")
    print(f"temporary memory {compiled.memory_analysis().temp_size_in_bytes / 2**30:.2f} GiB")
    print(f"estimated cycles {cycles(compiled.as_text(), dit.depth):.4g}")


if __name__ == "__main__":
    main()
