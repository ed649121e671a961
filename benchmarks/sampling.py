"""Guided sampling of the I2I prior against the same transformer in PyTorch, alternating in one run.

    python -m benchmarks.sampling --size=S --batch=4 --steps=20

Both sides: latents of 256 px (32 x 32 x 4), DPM-Solver++ with classifier-free guidance as one batch of 2 B rows, float32, the
same weights and noise. Ours is `diffusion.sample`, one compiled program, as the evaluation during training runs it, and the
same step by step, as `lumos_jax.sample` does. Theirs is `benchmarks/torch_dit.py` in eager mode, as releases sample, or with
compiled blocks (--compile). First prints how far the samples of both differ, then seconds and ratios over alternating pairs.

PyTorch is needed here only: pip install torch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.allocator import restart_with_tunables
from lumos_jax import config, diffusion, models
from lumos_jax.models.layers import positions
from lumos_jax.weights.rules import flatten

CHANNELS, SIDE, PATCH, FEATURES = 4, 32, 2, 768
PROCESS = diffusion.make_process(config.Diffusion(loss="simple"))


def make_weights(network: models.Network) -> Any:
    """The network's first parameters, and small random ones where they are zero, so that every layer matters."""
    params = jax.jit(network.init)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [leaf + 0.02 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


def make_ours(network: models.Network, params: Any, inputs: tuple, args: argparse.Namespace) -> dict[str, Callable]:
    """Functions that sample once and return latents (B, h, w, c): in one program, and step by step."""
    noise, feature, null = map(jnp.asarray, inputs)
    key = jax.random.key(0)
    stages = diffusion.stages(PROCESS, sampler="dpm++", steps=args.steps)

    def denoiser(params):
        def predict(x, t, condition):
            return network.apply(params, x, t, condition)

        conditions = (models.Condition(tokens=feature), models.Condition(tokens=null))
        return diffusion.guided(predict, *conditions, scale=args.guidance, process=PROCESS)

    @jax.jit
    def whole(params):
        return diffusion.sample(PROCESS, denoiser(params), noise, key, sampler="dpm++", steps=args.steps)

    @jax.jit
    def one(params, carry, row):
        return diffusion.step(PROCESS, denoiser(params), carry, row, name="dpm++", key=key)

    def stepwise():
        carry = diffusion.start(noise)
        for _, tables in stages:
            for index in range(len(tables["index"])):
                carry = one(params, carry, {name: table[index] for name, table in tables.items()})
        return np.asarray(carry[0])

    return {"ours": lambda: np.asarray(whole(params)), "ours, step by step": stepwise}


def make_theirs(network: models.Network, params: Any, inputs: tuple, args: argparse.Namespace) -> Callable:
    """As `make_ours`, in PyTorch."""
    try:
        import torch

        from benchmarks import torch_dit
    except ImportError as error:
        sys.exit(f"{error}: this comparison needs PyTorch (pip install torch), or --ours-only")
    net = torch_dit.DiT(network.width, network.depth, network.heads, CHANNELS, PATCH, (SIDE // PATCH) ** 2)
    net.load_state_dict({name: torch.from_numpy(value) for name, value in torch_names(network, params).items()})
    if args.compile:
        for block in net.blocks:
            block.compile()
    noise, feature, null = (torch.from_numpy(array) for array in inputs)
    noise, both = noise.permute(0, 3, 1, 2).contiguous(), torch.cat([feature, null])[:, 0]
    ((_, tables),) = diffusion.stages(PROCESS, sampler="dpm++", steps=args.steps)
    rows = [{name: float(table[index]) for name, table in tables.items()} for index in range(args.steps)]

    @torch.inference_mode()
    def run():
        x, previous = noise, torch.zeros_like(noise)
        for row in rows:
            yes, no = net(torch.cat([x, x]), torch.full((2 * len(x),), row["time"]), both).chunk(2)
            x0 = (x - row["sigma"] * (no + args.guidance * (yes - no))) / row["signal"]
            x = row["x_weight"] * x + row["x0_weight"] * (x0 + row["correction"] * (x0 - previous))
            previous = x0
        return x.permute(0, 2, 3, 1).numpy()

    return run


def torch_names(network: models.Network, params: Any) -> dict[str, np.ndarray]:
    """Our parameters under the names and in the shapes of `torch_dit.DiT`."""
    flat = {path: np.asarray(value) for path, value in flatten(params).items()}
    width = network.width
    grid = (SIDE // PATCH, SIDE // PATCH)
    where = positions(grid, network.position_base, network.position_scale, width)
    patch = flat["patch/kernel"].reshape(PATCH, PATCH, CHANNELS, width).transpose(3, 2, 0, 1)
    named = {"positions": np.asarray(where)[None], "embed.weight": patch, "embed.bias": flat["patch/bias"],
             "table": flat["final/table"], "final.weight": flat["final/out/kernel"].T,
             "final.bias": flat["final/out/bias"]}  # fmt: skip
    for module, index in (("time", 0), ("time", 2), ("tokens", 0), ("tokens", 2)):
        ours = f"{module}/fc{1 + index // 2}"
        named |= {f"{module}.{index}.weight": flat[f"{ours}/kernel"].T, f"{module}.{index}.bias": flat[f"{ours}/bias"]}
    layers = {"modulation": "modulation/{}", "qkv": "attn/qkv_{}", "out": "attn/out_{}", "q": "cross/q_{}",
              "kv": "cross/kv_{}", "cross": "cross/out_{}", "fc1": "mlp/fc1/{}", "fc2": "mlp/fc2/{}"}  # fmt: skip
    for theirs, ours in layers.items():
        kernels, biases = (flat["blocks/" + ours.format(part)] for part in ("kernel", "bias"))
        for layer in range(network.depth):
            bias = biases[layer].reshape(-1)
            named[f"blocks.{layer}.{theirs}.weight"] = kernels[layer].reshape(-1, bias.size).T
            named[f"blocks.{layer}.{theirs}.bias"] = bias
    return {name: np.array(value) for name, value in named.items()}  # PyTorch wants writable memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S", help="S, B, L, XL or WIDTHxDEPTHxHEADS")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile of their blocks")
    parser.add_argument("--ours-only", action="store_true", help="time our side alone, without PyTorch")
    args = parser.parse_args()
    restart_with_tunables()
    model = config.Model(size=args.size, patch_size=PATCH, dtype="float32")
    network = models.make_dit(
        model, latent_shape=(SIDE, SIDE, CHANNELS), out_channels=CHANNELS, token_shape=(1, FEATURES)
    )
    params = make_weights(network)
    rng = np.random.default_rng(0)
    shapes = ((args.batch, SIDE, SIDE, CHANNELS), (args.batch, 1, FEATURES), (args.batch, 1, FEATURES))
    inputs = tuple(rng.standard_normal(shape, np.float32) for shape in shapes)
    sides = make_ours(network, params, inputs, args)
    if not args.ours_only:
        sides["theirs"] = make_theirs(network, params, inputs, args)

    samples = {name: run() for name, run in sides.items()}  # compiles
    for name, value in samples.items():
        difference = np.abs(value - samples["ours"]).max() / np.abs(samples["ours"]).max()
        print(f"{name:>18}: differs from ours by {difference:.1e} of the samples' scale")
    clocks = {"clock": time.perf_counter, "processors": time.process_time}
    times: dict[str, list[list[float]]] = {name: [] for name in sides}
    for _ in range(args.pairs):
        for name, run in sides.items():
            start = [now() for now in clocks.values()]
            run()
            times[name].append([now() - before for now, before in zip(clocks.values(), start, strict=True)])
    for name, rows in times.items():
        for which, clock in enumerate(clocks):
            own, other = ([row[which] for row in side] for side in (rows, times.get("theirs", rows)))
            ratios = sorted(t / v for t, v in zip(other, own, strict=True))
            middle = statistics.median(ratios)
            print(f"{name:>18}, {clock:>10}: median {statistics.median(own):6.2f} s, theirs takes {middle:.2f} times as long "
                  f"({ratios[0]:.2f} .. {ratios[-1]:.2f} over {len(ratios)} pairs)")  # fmt: skip


if __name__ == "__main__":
    main()
