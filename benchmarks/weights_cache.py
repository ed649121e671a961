"""Reading released weights that a config names directly: as they are, on the first start with a cache, and on later ones.

    python -m benchmarks.weights_cache --gigabytes=1.5

A ViT-B (345 MB) as .pth, .npz (compressed) and .safetensors, and a T5 encoder of XXL's width as .bin shards, all random and
float32, taken in bfloat16 and hashed as training does. Prints processor seconds, the best of three (of first starts, of one),
with the files in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import tempfile
import time

import numpy as np

from benchmarks import import_memory
from lumos_jax.encoders import text_encoder
from lumos_jax.weights import files, torch_writer, vit_files, weights_cache
from lumos_jax.weights.placement import Take

WIDTH, DEPTH = 768, 12


def vit() -> dict[str, np.ndarray]:
    shapes = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, 197, WIDTH), "norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    shapes |= {"patch_embed.proj.weight": (WIDTH, 3, 16, 16), "patch_embed.proj.bias": (WIDTH,)}
    for i in range(DEPTH):
        for name, (out, inner) in {
            "attn.qkv": (3, 1),
            "attn.proj": (1, 1),
            "mlp.fc1": (4, 1),
            "mlp.fc2": (1, 4),
        }.items():
            shapes[f"blocks.{i}.{name}.weight"] = (out * WIDTH, inner * WIDTH)
            shapes[f"blocks.{i}.{name}.bias"] = (out * WIDTH,)
        shapes |= {f"blocks.{i}.{n}.{leaf}": (WIDTH,) for n in ("norm1", "norm2") for leaf in ("weight", "bias")}
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def t5(folder: pathlib.Path, layers: int) -> None:
    """The shards that `import_memory` writes, as PyTorch's."""
    import_memory.write(folder, layers)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for shard in sorted(set(index.values())):
        state, _ = files.read(folder / shard, "")
        arrays = {name: np.asarray(array) for name, array in state.items()}
        torch_writer.save(folder / shard.replace(".safetensors", ".bin"), arrays)
        (folder / shard).unlink()
    told = {name: shard.replace(".safetensors", ".bin") for name, shard in index.items()}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": told}))
    (folder / "model.safetensors.index.json").unlink()


def measure(load, path: pathlib.Path) -> tuple[float, str]:
    begun, take = time.process_time(), Take("bfloat16")
    load(path, take)
    return time.process_time() - begun, take.total()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.5, help="of the T5 encoder")
    gigabytes = parser.parse_args().gigabytes
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        state = vit()
        torch_writer.save(root / "vit.pth", {"teacher": state})
        np.savez_compressed(root / "vit.npz", **state)
        files.save_safetensors(state, root / "vit.safetensors", {})
        (root / "t5").mkdir()
        t5(root / "t5", max(1, round(gigabytes * 2**30 / import_memory.LAYER_BYTES)))
        loads = dict.fromkeys(
            ("vit.pth", "vit.npz", "vit.safetensors"), lambda path, take: vit_files.load_vit(str(path), 0, take)
        )
        loads["t5"] = lambda path, take: text_encoder.load_t5(str(path), take)
        print(f"{'':16}{'no cache':>10}{'first':>10}{'later':>10}  processor seconds")
        for name, load in loads.items():
            found = set()
            times = []
            for directory, runs in (("", 3), (str(root / "cache"), 1), (str(root / "cache"), 3)):
                os.environ[weights_cache.VARIABLE] = directory
                each = [measure(load, root / name) for _ in range(runs)]
                times.append(min(seconds for seconds, _ in each))
                found |= {total for _, total in each}
            assert len(found) == 1, "the network depends on the cache"
            print(f"{name:16}" + "".join(f"{seconds:10.2f}" for seconds in times), flush=True)


if __name__ == "__main__":
    main()
