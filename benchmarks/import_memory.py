"""Peak host memory of loading a large sharded checkpoint straight into a sharded layout.

    python -m benchmarks.import_memory --gigabytes=8

Writes a T5 v1.1 encoder with XXL's width and random float32 weights as safetensors shards of about 2 GB into a temporary
directory, then loads it in a process of its own, placed on 8 (fake) devices as training places it (sharding.Frozen), in
float32: the devices' copies are host memory here, so the bound is that one sharded copy and 1.5 times the largest shard.
Prints the anonymous memory at its peak, which leaves out the pages of the mapped file, and the bound.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

WIDTH, HIDDEN, HEADS, HEAD_DIM, VOCABULARY = 4096, 10240, 64, 64, 32128
LAYER_BYTES = 4 * (4 * WIDTH * HEADS * HEAD_DIM + 3 * WIDTH * HIDDEN + 2 * WIDTH)
GIB = 2**30


def write(folder: pathlib.Path, layers: int) -> tuple[int, int]:
    """Writes the checkpoint; returns (all bytes, bytes of the largest shard)."""
    from safetensors.numpy import save_file

    architecture = {
        "model_type": "t5", "feed_forward_proj": "gated-gelu", "d_model": WIDTH, "num_layers": layers, "num_heads": HEADS,
        "d_kv": HEAD_DIM, "d_ff": HIDDEN, "vocab_size": VOCABULARY, "relative_attention_num_buckets": 32,
        "layer_norm_epsilon": 1e-6,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(architecture))
    inner = HEADS * HEAD_DIM
    block = {f"layer.0.SelfAttention.{part}.weight": (inner, WIDTH) for part in "qkv"}
    block |= {"layer.0.SelfAttention.o.weight": (WIDTH, inner), "layer.0.layer_norm.weight": (WIDTH,)}
    block |= {f"layer.1.DenseReluDense.{part}.weight": (HIDDEN, WIDTH) for part in ("wi_0", "wi_1")}
    block |= {"layer.1.DenseReluDense.wo.weight": (WIDTH, HIDDEN), "layer.1.layer_norm.weight": (WIDTH,)}
    ends = {
        "shared.weight": (VOCABULARY, WIDTH), "encoder.final_layer_norm.weight": (WIDTH,),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, HEADS),
    }  # fmt: skip
    parts = [ends] + [{f"encoder.block.{i}.{name}": shape for name, shape in block.items()} for i in range(layers)]
    each = max(1, int(2 * GIB // LAYER_BYTES))
    shards = [parts[:1], *(parts[i : i + each] for i in range(1, len(parts), each))]
    rng, places, sizes = np.random.default_rng(0), {}, []
    for number, shard in enumerate(shards):
        file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shapes = {name: shape for part in shard for name, shape in part.items()}
        save_file({name: rng.random(shape, np.float32) for name, shape in shapes.items()}, file)
        places |= dict.fromkeys(shapes, file.name)
        sizes.append(file.stat().st_size)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return sum(sizes), max(sizes)


def load(folder: str) -> None:
    """In the process that is measured: loads and prints the peak of its anonymous memory, before and while."""
    import jax

    from lumos_jax import config, encoders
    from lumos_jax.train import sharding

    peak, done = anonymous(), threading.Event()
    before = peak

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.01)

    place = sharding.Frozen(sharding.make_mesh(config.Mesh()))
    watcher = threading.Thread(target=watch)
    watcher.start()
    _, params = encoders.make_text_encoder(config.Encoder(kind="t5", weights=folder, output="all"), place)
    done.set()
    watcher.join()
    leaves = jax.tree.leaves(params)
    held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    first = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves) / sum(leaf.nbytes for leaf in leaves)
    print(json.dumps({"before": before, "peak": peak, "held": held, "first": first}))


def anonymous() -> int:
    """Bytes of this process's memory that belong to no file (Linux)."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("no RssAnon in /proc/self/status")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(args.load)
        return
    with tempfile.TemporaryDirectory() as root:
        total, largest = write(pathlib.Path(root), max(1, round(args.gigabytes * GIB / LAYER_BYTES)))
        environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "benchmarks.import_memory", f"--load={root}"]
        begun = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
    used, bound = found["peak"] - found["before"], found["held"] + 1.5 * largest
    print(
        f"checkpoint {total / GIB:.2f} GiB, largest shard {largest / GIB:.2f} GiB, on the devices "
        f"{found['held'] / GIB:.2f} GiB, {found['first']:.1%} of the parameters on the first"
    )
    print(f"peak {used / GIB:.2f} GiB of at most {bound / GIB:.2f} GiB, {time.perf_counter() - begun:.0f} s")
    print(f"beyond the copy: {(used - found['held']) / largest:.2f} times the largest shard (bound 1.5)")


if __name__ == "__main__":
    main()
