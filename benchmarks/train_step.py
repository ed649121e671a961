"""One full training step of ours against the same transformer in PyTorch, alternating in one run.

    python -m benchmarks.train_step --size=S --patch=2 --input=16 --batch=16
    python -m benchmarks.train_step --size=desk

Both sides: forward, backward, AdamW and the EMA of the weights, in float32, on the same shapes, with the plain
MSE on the noise. Theirs is `diffusers`' PixArtTransformer2DModel, with PyTorch's fused AdamW and multi-tensor EMA. It
shares one modulation Linear(D, 6 D) between blocks where ours has one in each, as Lumos has: at equal sizes we have a third
more parameters to differentiate and update. `--own-modulation` gives each of their blocks its own, so that both sides are
the same network. Both run with the allocator setting of `launch/`, unless GLIBC_TUNABLES is set. Prints each side's time, on
the clock and of processors, and the ratios, medians over pairs. Beside other programs trust processor time, and pin the run to
one core (taskset -c 0).

PyTorch and diffusers are needed here only: pip install torch diffusers.
"""

from __future__ import annotations

import argparse
import functools
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.allocator import restart_with_tunables
from lumos_jax import config, models
from lumos_jax.models.network import make_size

LEARNING_RATE, EMA_DECAY = 1e-4, 0.9999
DESK = {
    "width": 128, "depth": 4, "heads": 4, "patch": 4, "input": 32, "channels": 3, "batch": 64, "tokens": 17, "token_dim": 192,
}  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S", choices=["S", "B", "L", "XL", "desk"])
    parser.add_argument("--depth", type=int, help="blocks, if not the size's own")
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--input", type=int, default=16, help="side of the latent")
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1, help="condition tokens")
    parser.add_argument("--token-dim", type=int, default=768)
    parser.add_argument("--remat", default="none", choices=["none", "dots", "qkv", "mlp", "full"])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=2.0, help="least duration of one side's turn")
    parser.add_argument("--own-modulation", action="store_true", help="a modulation Linear in each of their blocks too")
    parser.add_argument("--ours-only", action="store_true", help="time our side alone, without PyTorch")
    args = parser.parse_args()
    args.width = args.heads = None
    if args.size == "desk":
        vars(args).update(DESK)
    else:
        size = make_size(config.Model(size=args.size))
        args.width, args.heads, args.depth = size.width, size.heads, args.depth or size.depth
    return args


def arrays(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """One fixed batch, channels last."""
    rng = np.random.default_rng(0)
    latent = (args.batch, args.input, args.input, args.channels)
    return {
        "x": rng.standard_normal(latent, np.float32),
        "noise": rng.standard_normal(latent, np.float32),
        "t": rng.integers(0, 1000, args.batch).astype(np.float32),
        "tokens": rng.standard_normal((args.batch, args.tokens, args.token_dim), np.float32),
    }


def make_ours(args: argparse.Namespace) -> tuple[Callable[[], float], int]:
    """(a function that takes one step and returns the loss, number of parameters)."""
    model = config.Model(
        size=f"{args.width}x{args.depth}x{args.heads}", patch_size=args.patch,
        dtype="float32", remat=args.remat,
    )  # fmt: skip
    dit = models.make_dit(
        model,
        latent_shape=(args.input, args.input, args.channels),
        out_channels=args.channels,
        token_shape=(args.tokens, args.token_dim),
    )
    optimizer = optax.adamw(LEARNING_RATE)
    params = jax.jit(dit.init)(jax.random.key(0))

    def loss_of(params, batch):
        condition = models.Condition(tokens=batch["tokens"])
        return jnp.square(dit.apply(params, batch["x"], batch["t"], condition) - batch["noise"]).mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        params, ema, moments = state
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, moments = optimizer.update(grads, moments, params)
        params = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda e, p: e + (1 - EMA_DECAY) * (p - e), ema, params)
        return (params, ema, moments), loss

    batch = jax.tree.map(jnp.asarray, arrays(args))
    state = (params, jax.tree.map(jnp.copy, params), optimizer.init(params))

    def run():
        nonlocal state
        state, loss = step(state, batch)
        return float(loss)

    return run, sum(p.size for p in jax.tree.leaves(params))


def make_theirs(args: argparse.Namespace) -> tuple[Callable[[], float], int]:
    """As `make_ours`, in PyTorch."""
    try:
        import torch
        from diffusers import PixArtTransformer2DModel
    except ImportError as error:
        sys.exit(f"{error}: this comparison needs PyTorch and diffusers (pip install torch diffusers), or --ours-only")
    torch.manual_seed(0)
    network = PixArtTransformer2DModel(
        num_attention_heads=args.heads,
        attention_head_dim=args.width // args.heads,
        in_channels=args.channels,
        out_channels=args.channels,
        num_layers=args.depth,
        cross_attention_dim=args.width,
        sample_size=args.input,
        patch_size=args.patch,
        caption_channels=args.token_dim,
        use_additional_conditions=False,
    )
    if args.own_modulation:
        give_own_modulation(network, args.width)
    network.train()
    params = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=LEARNING_RATE, weight_decay=1e-4, fused=True)
    ema = [p.detach().clone() for p in params]
    batch = {name: torch.from_numpy(value) for name, value in arrays(args).items()}
    x, noise = (batch[name].permute(0, 3, 1, 2).contiguous() for name in ("x", "noise"))
    nothing = {"resolution": None, "aspect_ratio": None}

    def run():
        out = network(x, batch["tokens"], batch["t"], added_cond_kwargs=nothing, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(out, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(ema, params, 1 - EMA_DECAY)
        return loss.item()

    return run, sum(p.numel() for p in params)


def give_own_modulation(network, width: int) -> None:
    """Each block computes its six modulations from the timestep embedding by a Linear of its own."""
    import torch

    shared = network.adaln_single
    shared.linear = torch.nn.Identity()
    for block in network.transformer_blocks:
        block.modulation = torch.nn.Linear(width, 6 * width)
        block.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"timestep": module.modulation(kwargs["timestep"])}),
            with_kwargs=True,
        )


class Cost(NamedTuple):
    """Of one step: seconds on the clock, seconds of processor time of all threads, page faults."""

    wall: float
    processor: float
    faults: float


def cost_of_step(run: Callable[[], float], least: float) -> Cost:
    """Means over as many steps as fill `least` seconds."""

    def now():
        return time.perf_counter(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    count, start = 0, now()
    while True:
        run()
        count += 1
        spent = [after - before for before, after in zip(start, now(), strict=True)]
        if spent[0] >= least:
            return Cost(*(part / count for part in spent))


def main() -> None:
    args = parse()
    restart_with_tunables()
    sides = {"ours": make_ours(args)} | ({} if args.ours_only else {"theirs": make_theirs(args)})
    for name, (run, count) in sides.items():
        start = time.perf_counter()
        first = run()
        print(f"{name:>6}: {count:>11,} parameters, first step {time.perf_counter() - start:.1f} s, loss {first:.3f}")
        run()
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    for _ in range(args.pairs):
        for name, (run, _) in sides.items():
            costs[name].append(cost_of_step(run, args.seconds))
    for name, values in costs.items():
        wall, processor, faults = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"{name:>6}: median {1e3 * wall:8.1f} ms/step, best {1e3 * min(values).wall:8.1f} ms/step, "
              f"{1e3 * processor:.1f} ms of processor time, {faults:.0f} page faults")  # fmt: skip
    if args.ours_only:
        return
    pairs = list(zip(costs["ours"], costs["theirs"], strict=True))
    for what in ("wall", "processor"):
        ratios = sorted(getattr(theirs, what) / getattr(ours, what) for ours, theirs in pairs)
        print(f"ratio (theirs / ours, {what} time): median {statistics.median(ratios):.2f}, "
              f"range {ratios[0]:.2f} .. {ratios[-1]:.2f} over {len(ratios)} pairs")  # fmt: skip


if __name__ == "__main__":
    main()
