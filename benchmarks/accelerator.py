"""Proves on one GPU or TPU what a machine without them can only compile, and measures it, within ten minutes.

    python -m benchmarks.accelerator                      on the accelerator that JAX finds; on a CPU the same in small
    python -m benchmarks.accelerator --only=step,torch --sizes=XL
    python -m benchmarks.accelerator --only=step --record  so that `lumos_jax.plan` shows these steps beside its figures

    numerics   forward pass and gradient against the CPU: float32 to 1e-5 of the output's scale, bfloat16 to 3 %
    attention  the attention kernel that a step takes against the plain form: difference and time, forward and backward
    step       ms a step, MFU and peak memory of S to XL at 256 and 512 px, cached features; memory against `plan`'s figure
    torch      the same transformer in PyTorch (torch.compile, SDPA, fused AdamW, bfloat16 autocast), where torch is installed
    resume     six steps against three, a copy of the state through the host, and three; with and without deterministic ops
    sample     images a second: 20 steps of dpm++ with guidance, decoded by the autoencoder

Everything is assembled by Experiment.build, as training assembles it, with random weights and random features. It reads no
files and needs jax, flax, optax and numpy alone.
Prints Markdown tables; the exit code is 1 if numerics, attention or resume are wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import config, models
from lumos_jax.config import io as config_io
from lumos_jax.models import attention, fused_attention
from lumos_jax.models.network import make_size
from lumos_jax.planning import ahead, chips, measured
from lumos_jax.planning.job import Job, make_job
from lumos_jax.train import sharded_forward
from lumos_jax.train.experiment import Experiment

SECTIONS = ("numerics", "attention", "step", "torch", "resume", "sample")
# Images a step that fill an 80 GB card well without filling its memory, at 256 px; a quarter of them at 512 px.
BATCHES = {"S": 512, "B": 256, "L": 128, "XL": 128}
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
FLOAT32_BOUND, BFLOAT16_BOUND = 1e-5, 3e-2


def settings_of(size: str, pixels: int, batch: int, small: bool, **model: Any) -> config.Settings:
    """I2I at the paper's shapes, random frozen weights; in small: pixels as latents, and networks of two layers."""
    encoder, autoencoder = {"weights": "random:0"}, {"weights": "random:0"}
    if small:
        encoder |= {"size": "32x2x4/8", "image_size": pixels}
        autoencoder["weights"] = "identity"
        model |= {"size": "32x2x2", "patch_size": 4, "dtype": "float32"}
    return config_io.from_dict(
        {
            "data": {"source": "scenes", "image_size": pixels},
            "encoder": encoder,
            "autoencoder": autoencoder,
            "model": {"size": size} | model,
            "train": {"batch_size": batch},
            "eval": {"every": 0},
        }
    )


@dataclasses.dataclass
class Run:
    """A run on cached features with one random batch. state: donated by each step, so replaced."""

    job: Job
    experiment: Experiment
    state: Any
    batch: Any

    @classmethod
    def make(cls, settings: config.Settings) -> Run:
        devices = jax.devices()[:1]
        job = make_job(settings, devices, cached=True)
        # Nothing is loaded: random weights of the encoders would take longer than the steps.
        frozen = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), job.experiment.frozen)
        experiment = dataclasses.replace(job.experiment, frozen=frozen)
        rng = np.random.default_rng(0)
        batch = {name: jnp.asarray(random_array(rng, a), a.dtype) for name, a in job.batch.items()}
        batch["weight"] = jnp.ones(job.batch["weight"].shape)
        return cls(job, experiment, experiment.init_state(), batch)

    def compile(self) -> Any:
        return self.experiment.train_step.lower(self.state, self.experiment.frozen, self.batch).compile()

    def steps(self, compiled: Callable, count: int) -> list[float]:
        """Takes steps; returns their losses."""
        losses = []
        for _ in range(count):
            self.state, metrics = compiled(self.state, self.experiment.frozen, self.batch)
            losses.append(metrics["loss"])
        return [float(loss) for loss in losses]


def random_array(rng: np.random.Generator, shape: Any) -> np.ndarray:
    """Small normal numbers: latent moments hold log variances, which must not overflow."""
    return 0.3 * rng.standard_normal(shape.shape, np.float32)


def relative(a: Any, b: Any) -> float:
    """Largest difference of two trees, relative to the largest value of each array of `b`."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(
        float(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max() / max(np.abs(y).max(), 1e-30))
        for x, y in pairs
    )


class Table:
    """A Markdown table, printed row by row."""

    def __init__(self, *heads: str):
        self.row(*heads)
        print("|" + " --- |" * len(heads), flush=True)

    def row(self, *cells: Any) -> None:
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


# Numerics.


def numerics(args: argparse.Namespace) -> bool:
    """The network's output and gradient on the accelerator against float32 on the CPU."""
    head_dim, tokens = 72, 32  # of XL at 512 px: 1,024 tokens, so that the attention kernel runs in bfloat16
    size = f"{4 * head_dim}x2x4"
    host, device = jax.local_devices(backend="cpu")[0], jax.devices()[0]
    rng = np.random.default_rng(0)
    shape = (4, 2 * tokens, 2 * tokens, 4) if not args.small else (4, 16, 16, 4)
    inputs = (rng.standard_normal(shape, np.float32), np.arange(4, dtype=np.float32) * 250)
    features = rng.standard_normal((4, 17, 64), np.float32)
    target = rng.standard_normal((*shape[:-1], 8), np.float32)

    def run(dtype: str, where: Any, precision: str = "highest") -> Any:
        net = models.make_dit(
            config.Model(size=size, dtype=dtype, remat="mlp"),
            latent_shape=shape[1:],
            out_channels=8,
            token_shape=(17, 64),
        )
        hardware = sharded_forward.hardware_of(where)

        def loss(params, x, t, features):
            out = net.apply(params, x, t, models.Condition(tokens=features), hardware=hardware)
            return jnp.square(out - target).mean(), out

        with jax.default_device(host):
            # Gates and outputs start at zero: moved, so that every layer counts.
            params = jax.tree.map(lambda p: p + 0.02 * rng_like(p), jax.jit(net.init)(jax.random.key(0)))
        params, *arrays = jax.device_put((params, *inputs, features), where)
        with jax.default_matmul_precision(precision):
            (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, *arrays)
        return jax.device_get((out, grads))

    exact, right = run("float32", host), True
    printed = Table("compute dtype", "matmul precision", "output", "gradient", "bound of the output")
    for dtype, precision, bound in (
        ("float32", "default", None),  # what Experiment.build avoids
        ("float32", "highest", FLOAT32_BOUND),
        ("bfloat16", "highest", BFLOAT16_BOUND),
    ):
        found = run(dtype, device, precision)
        errors = [relative(one, other) for one, other in zip(found, exact, strict=True)]
        printed.row(dtype, precision, *(f"{e:.1e}" for e in errors), "-" if bound is None else f"{bound:.0e}")
        right &= bound is None or errors[0] <= bound
    return right


def rng_like(p: jax.Array) -> np.ndarray:
    return np.random.default_rng(p.size).standard_normal(p.shape, np.float32)


def attention_kernels(args: argparse.Namespace) -> bool:
    """The attention kernel against the plain form at the shapes of XL at 256, 512 and 1024 px."""
    hardware = "" if args.small else sharded_forward.hardware_of(jax.devices()[0])
    printed = Table("tokens", "kernel", "error: output, dq, dk, dv", "plain form's", "plain ms", "kernel ms", "faster")
    right = True
    for tokens, batch in ((256, 32), (1024, 8), (4096, 1)) if not args.small else ((128, 1),):
        kernel = attention.kernel_for(hardware, tokens, 72, jnp.dtype("bfloat16")) or ("pallas" if args.small else "")
        if not kernel:
            continue
        keys = jax.random.split(jax.random.key(tokens), 4)
        q, k, v, do = (jax.random.normal(key, (batch, tokens, 16, 72), jnp.float32) for key in keys)
        forms = {"exact": attention.attend, "plain": attention.attend, kernel: _kernel(kernel, args.small)}
        results, seconds = {}, {}
        for name, form in forms.items():
            dtype = jnp.float32 if name == "exact" else jnp.bfloat16

            @jax.jit
            def both(q, k, v, do, form=form):
                out, pull = jax.vjp(form, q, k, v)
                return out, pull(do)

            arrays = [a.astype(dtype) for a in (q, k, v, do)]
            with jax.default_matmul_precision("highest" if name == "exact" else "default"):
                out, grads = jax.device_get(both(*arrays))
            results[name] = [out, *grads]
            seconds[name] = seconds_of(lambda both=both, arrays=arrays: jax.block_until_ready(both(*arrays)))
        errors = {name: [relative(*p) for p in zip(results[name], results["exact"], strict=True)] for name in forms}
        words = {name: ", ".join(f"{e:.1e}" for e in errors[name]) for name in forms}
        times = [f"{1e3 * seconds[name]:.2f}" for name in ("plain", kernel)]
        printed.row(tokens, kernel, words[kernel], words["plain"], *times, f"{seconds['plain'] / seconds[kernel]:.2f}")
        right &= all(e <= max(2 * p, 1e-2) for e, p in zip(errors[kernel], errors["plain"], strict=True))
    return right


def _kernel(name: str, interpret: bool) -> Callable:
    if name == "cudnn":
        return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

    def pallas(q, k, v):
        qkv = jnp.stack([q, k, v], 1).transpose(0, 1, 3, 4, 2)  # (B, 3, H, K, N)
        return fused_attention.attend(qkv, interpret).transpose(0, 3, 1, 2)

    return pallas


def seconds_of(call: Callable, least: float = 1.0) -> float:
    """Median seconds of a call, over at least five calls and `least` seconds, after two."""
    call(), call()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < least and len(times) < 200):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


# Speed and memory.


def shapes(args: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """(size, pixels, batch), in order of the memory they take, as the allocator knows its own maximum only."""
    if args.small:
        yield "test", 16, 16
        return
    for size in args.sizes:
        for pixels, share in ((256, 1), (512, 4)):
            if pixels in args.pixels and (size in ("S", "XL") or pixels == 256):
                yield size, pixels, args.batch or BATCHES[size] // share


def chip_name() -> str:
    """Of this device, as in chips.CHIPS; empty if it is not there."""
    kind = jax.devices()[0].device_kind.lower()
    known = {"v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v6 lite": "v6e", "v6e": "v6e", "a100": "a100"}
    known |= {"h100": "h100", "h200": "h100"}
    return next((name for text, name in known.items() if text in kind), "")


def step(args: argparse.Namespace) -> bool:
    printed = Table("network", "px", "images", "compile s", "ms a step", "images/s", "model TFLOP/s", "MFU",
                    "memory by the compiler", "peak of the allocator", "loss")  # fmt: skip
    chip, finite, rows = chip_name(), True, []
    peak = chips.CHIPS[chip].peak if chip else 0.0
    for size, pixels, batch in shapes(args):
        run = Run.make(settings_of(size, pixels, batch, args.small, remat=args.remat))
        begun = time.perf_counter()
        compiled = run.compile()
        spent = time.perf_counter() - begun
        losses = run.steps(compiled, 3)
        seconds = step_seconds(lambda run=run, compiled=compiled: run.steps(compiled, args.steps), args.steps)
        flops = run.job.model_flops()[0]
        memory = ahead.memory_of(compiled).total / chips.GIB
        held = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / chips.GIB
        printed.row(
            size, pixels, batch, f"{spent:.0f}", f"{1e3 * seconds:.1f}", f"{batch / seconds:.0f}",
            f"{flops / seconds / 1e12:.1f}", f"{flops / seconds / peak:.1%}" if peak else "-", f"{memory:.2f} GiB",
            f"{held:.2f} GiB", f"{losses[-1]:.4f}",
        )  # fmt: skip
        rows.append(
            measured.Measured(
                chip, jax.devices()[0].device_kind, jax.__version__, size, pixels, batch, args.remat,
                round(1e3 * seconds, 1), round(flops / seconds / 1e12, 1), round(held, 2),
            )
        )  # fmt: skip
        finite &= bool(np.isfinite(losses).all())
        del run, compiled
        gc.collect()
    if args.record and chip and finite:
        measured.record(rows)
    return finite


def step_seconds(call: Callable, count: int) -> float:
    """Seconds a step: the median of three turns of `count` steps each."""
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        call()
        times.append((time.perf_counter() - begun) / count)
    return statistics.median(times)


def sample(args: argparse.Namespace) -> bool:
    """Images a second of the samplers, guidance included; decoded to pixels."""
    printed = Table("network", "px", "images", "compile s", "seconds", "images/s")
    for size, pixels, batch in [one for one in shapes(args) if one[0] in ("test", "XL")]:
        batch = min(batch, 64)
        settings = settings_of(size, pixels, batch, args.small)
        experiment = Experiment.build(settings, jax.devices()[:1])
        sampling = experiment.task.sampling
        evaluation = dataclasses.replace(settings.eval, sampler="dpm++", steps=20, guidance=4.5)
        keys = tuple(jax.random.split(jax.random.key(0)))
        params = jax.jit(experiment.task.network.init)(jax.random.key(0))
        images = np.random.default_rng(0).integers(0, 256, (batch, pixels, pixels, 3), np.uint8)

        @jax.jit
        def generate(params, frozen, images, sampling=sampling, evaluation=evaluation, keys=keys):
            return sampling.generate_batch(params, frozen, {"image": images}, keys, 1, evaluation)

        begun = time.perf_counter()
        compiled = generate.lower(params, experiment.frozen, images).compile()
        spent = time.perf_counter() - begun
        seconds = seconds_of(lambda c=compiled, p=params, e=experiment, i=images: np.asarray(c(p, e.frozen, i)), 4.0)
        printed.row(size, pixels, batch, f"{spent:.0f}", f"{seconds:.2f}", f"{batch / seconds:.1f}")
        del experiment, params, compiled
        gc.collect()
    return True


# Resume.


def resume(args: argparse.Namespace) -> bool:
    """Each mode in a process of its own, as XLA reads its flags once."""
    printed, right = Table("network", "ops", "the same six steps twice", "resumed after three", "ms a step"), True
    for flags in ("", DETERMINISTIC):
        environment = dict(os.environ, XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip())
        done = subprocess.run(child("resume", args), env=environment, capture_output=True, text=True, check=False)
        lines = [line.split("\t") for line in done.stdout.splitlines() if line.startswith("row\t")]
        if done.returncode or not lines:
            print(done.stdout, done.stderr[-4000:], sep="\n")
            return False
        for _, network, again, resumed, milliseconds in lines:
            printed.row(network, "deterministic" if flags else "default", again, resumed, milliseconds)
            right &= not flags or (again == resumed == "bit-identical")
    return right


def resume_child(args: argparse.Namespace) -> bool:
    for size, pixels, batch in (("B", 256, 64), ("B", 512, 16)) if not args.small else (("test", 16, 16),):
        settings = settings_of(size, pixels, batch, args.small, remat=args.remat)
        run = Run.make(settings)
        compiled = run.compile()

        def six(through_host: bool, run=run, compiled=compiled):
            run.state = run.experiment.init_state()
            run.steps(compiled, 3)
            if through_host:
                layouts = jax.tree.map(lambda a: a.sharding, run.state)
                host = jax.device_get(run.state)
                run.state = jax.device_put(host, layouts)
            run.steps(compiled, 3)
            return jax.device_get(run.state)

        first, again, resumed = six(False), six(False), six(True)
        seconds = step_seconds(lambda run=run, compiled=compiled: run.steps(compiled, 10), 10)
        words = []
        for other in (again, resumed):
            same = all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(other)))
            words.append("bit-identical" if same else f"{relative(other.params, first.params):.1e} apart")
        print("row", f"{size}/2 {pixels} px" if not args.small else "test", *words, f"{1e3 * seconds:.1f}", sep="\t")
    return True


# PyTorch.


def torch_step(args: argparse.Namespace) -> bool:
    """The same transformer, in PyTorch as a good user writes it."""
    try:
        import torch
    except ImportError:
        print("torch is not installed: no comparison")
        return True
    from benchmarks.torch_dit import TorchStep  # needs torch

    printed = Table(
        "network", "px", "images", "parameters", "first two steps s", "ms a step", "images/s", "peak memory"
    )
    for size, pixels, batch in shapes(args):
        made = make_size(settings_of(size, pixels, batch, args.small).model)
        latent = (4, pixels // 8, pixels // 8) if not args.small else (3, pixels, pixels)
        theirs = TorchStep(made.width, made.depth, made.heads, latent, batch, compiled=not args.small)
        begun = time.perf_counter()
        theirs.steps(2)
        spent = time.perf_counter() - begun
        seconds = step_seconds(lambda theirs=theirs: theirs.steps(args.steps), args.steps)
        held = torch.cuda.max_memory_allocated() / chips.GIB if torch.cuda.is_available() else 0.0
        printed.row(size, pixels, batch, f"{theirs.parameters / 1e6:.0f} M", f"{spent:.0f}", f"{1e3 * seconds:.1f}",
                    f"{batch / seconds:.0f}", f"{held:.2f} GiB")  # fmt: skip
        del theirs
        gc.collect()
    return True


def child(section: str, args: argparse.Namespace) -> list[str]:
    """The command of a section in a process of its own, so that its memory is free afterwards."""
    command = [sys.executable, "-m", "benchmarks.accelerator", f"--only={section}", "--child", f"--remat={args.remat}"]
    command += [f"--sizes={','.join(args.sizes)}", f"--pixels={','.join(map(str, args.pixels))}"]
    command += [f"--steps={args.steps}", f"--batch={args.batch}"]
    return [*command, *(["--small"] if args.small else []), *(["--record"] if args.record else [])]


RUNS = {
    "numerics": numerics,
    "attention": attention_kernels,
    "step": step,
    "torch": torch_step,
    "resume": resume_child,
    "sample": sample,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"sections, of {', '.join(SECTIONS)}")
    parser.add_argument("--sizes", default="S,B,L,XL", help="sizes of the network")
    parser.add_argument("--pixels", default="256,512", help="image sizes; 512 for S and XL")
    parser.add_argument("--batch", type=int, default=0, help="images a step; 0: a batch that fits 80 GB")
    parser.add_argument("--remat", default="none", help="config.model.remat; none is the fastest on GPUs")
    parser.add_argument("--steps", type=int, default=10, help="steps of one of three turns")
    parser.add_argument("--small", action="store_true", help="the test configuration, as on a CPU")
    parser.add_argument("--record", action="store_true", help="add the steps to lumos_jax/planning/measured.json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.sizes = args.sizes.split(",")
    args.pixels = [int(pixels) for pixels in args.pixels.split(",")]
    chosen = args.only.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"--only={args.only}: {', '.join(unknown)} is none of {', '.join(SECTIONS)}")
    if args.child:
        return 0 if RUNS[chosen[0]](args) else 1
    probe = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, jax.__version__, sep='\\n')"
    platform, kind, version = subprocess.check_output([sys.executable, "-c", probe], text=True).splitlines()[-3:]
    args.small |= platform == "cpu"
    print(f"# {kind}, jax {version}, {'small' if args.small else 'remat=' + args.remat}\n", flush=True)
    wrong = []
    for section in chosen:
        print(f"## {section}\n", flush=True)
        begun = time.perf_counter()
        right = (
            resume(args) if section == "resume" else subprocess.run(child(section, args), check=False).returncode == 0
        )
        print(f"\n{section}: {'done' if right else 'WRONG'}, {time.perf_counter() - begun:.0f} s\n", flush=True)
        wrong += [] if right else [section]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
