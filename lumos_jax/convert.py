"""Weights in and out.

python -m lumos_jax.convert import --kind=lumos-i2i --source=Lumos_I2I.pth --out=runs/lumos
    a released prior becomes a run directory: sample from it, or train from it with --config.init_from=runs/lumos
python -m lumos_jax.convert import --kind=image-encoder --source=dino_vitbase16_pretrain.pth --out=weights/dino
    a frozen network becomes a directory that config.encoder.weights (autoencoder.weights) can name
python -m lumos_jax.convert export --workdir=runs/xl --format=official --out=release
    a run's EMA weights under the names of the official release, with a model card
python -m lumos_jax.convert export --workdir=runs/dino --format=encoder --out=weights/mine
    the encoder that a run of dino or moco trained, for config.encoder.weights, with what whitens its features; of a
    contrastive run both encoders in one directory, for encoder.kind=vit and encoder.kind=clip_text

--source is a file (.safetensors, .npz, .pth, .bin), a directory, or a hub id. Every name is loaded, dropped for a reason, or an
error. --dry-run prints the report from the shapes alone, and writes nothing; it also takes a .json file that maps names to
shapes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from huggingface_hub import ModelCard, ModelCardData

from lumos_jax import cli, config, data, encoders, fileio, progress, tasks
from lumos_jax.checkpoints import CheckpointError, Checkpoints, quiet_logs
from lumos_jax.config import io as config_io
from lumos_jax.encoders import frozen, whitening
from lumos_jax.models import position_scale
from lumos_jax.models.network import make_size
from lumos_jax.tasks import releases
from lumos_jax.train import finetune
from lumos_jax.weights import files, official, rules, torch_files

PRIOR_FORMATS = ("official", "safetensors", "diffusers")
ENCODER = "encoder"
WHITENING_BATCH = 256  # images

# Of the model card: how each format is loaded, which weights there are, and what is left out, as metrics of the machine.
_LOADING = {
    "official": '`torch.load("lumos_{step}.pth")["state_dict"]`, under the names of the official Lumos release.',
    "safetensors": '`safetensors.torch.load_file("lumos_{step}.safetensors")`, under the names of the official Lumos release.',
    "encoder": "`--config.encoder.weights=DIRECTORY`, with the image size, or the tokenizer, of the settings below.",
    "diffusers": (
        "`transformer/`, under diffusers' names of a PixArt-like transformer. Each block has its own modulation "
        "(`norm1.linear`), for which diffusers ships no class."
    ),
}
_WEIGHTS = {"ema": "exponential moving average of the parameters", "params": "raw parameters"}
_LEFT_OUT = ("step", "images_per_second", "step_seconds", "data_wait_fraction", "device_wait_fraction", "host_fraction")


def import_prior(args: argparse.Namespace) -> str:
    """Writes a released prior as a run directory at step 0, and returns its report."""
    prior = releases.load(args.source, "--source", kind=args.kind, heads=args.heads, shapes_only=args.dry_run)
    networks = {"encoder.weights": args.encoder, "autoencoder.weights": args.autoencoder}
    settings = config.replace(prior.settings, {name: path for name, path in networks.items() if path})
    prior = dataclasses.replace(prior, settings=settings)
    if not args.encoder and releases.RELEASES[args.kind].unhosted and not args.dry_run:
        raise ValueError(
            f"--encoder is missing: a {args.kind} conditions on features of a network that is on no hub; give its file (as "
            f"{prior.settings.encoder.weights}), or a directory that --kind=image-encoder made of it"
        )
    if not args.dry_run:
        _write(args.out, lambda folder: _write_run(folder, prior, args.source))
    return prior.report.table()


def _write_run(folder: pathlib.Path, prior: releases.Prior, source: str) -> None:
    config_io.save(prior.settings, folder / "config.json")
    report = {"source": source, "loaded": prior.report.loaded, "dropped": prior.report.dropped}
    (folder / "handoff.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    checkpoints = Checkpoints(folder, config.Checkpoint())
    meta = {"settings": config_io.to_dict(prior.settings), "fingerprints": {}, "imported": source, "memory": {}}
    checkpoints.save(0, {"params": prior.params}, meta)
    checkpoints.wait()
    checkpoints.close()


def import_frozen(args: argparse.Namespace) -> str:
    """Writes a frozen network as a directory of one safetensors file and its description; returns its report."""
    made = frozen.read(args.kind, args.source, field="--source", heads=args.heads, shapes_only=args.dry_run)
    if made.report is None:
        raise ValueError(f"--source={args.source} is what `convert import` made; a config can name it as it is")
    if not args.dry_run:
        _write(args.out, lambda folder: frozen.save(folder, made, args.source))
    return made.report.table()


def _write(out: str, fill: Callable[[pathlib.Path], None]) -> None:
    """Fills a new directory under a temporary name and renames it, so that nothing half-written is left under its name."""
    folder = pathlib.Path(out).expanduser()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        fill(partial)
        partial.rename(folder)
    except OSError as error:
        raise fileio.failure(error, f"--out={out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def export(args: argparse.Namespace) -> str:
    """Writes a run's weights for users of the official release, or its encoder for ours; returns a sentence about it."""
    workdir = pathlib.Path(args.workdir)
    settings = config_io.load(workdir / "config.json")
    checkpoints = Checkpoints(workdir)
    step = checkpoints.find(args.checkpoint)
    placement = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    params = jax.tree.map(np.asarray, finetune.read_weights(checkpoints, step, args.weights, placement))
    params.pop("align", None)  # the projector of alignment is of training alone
    meta = checkpoints.meta(step)
    checkpoints.close()
    trained = tasks.task_class(settings.task.name).trained_encoders(settings, params)
    if bool(trained) != (args.format == ENCODER):
        right = ENCODER if trained else ", ".join(PRIOR_FORMATS)
        raise ValueError(f"--format={args.format} does not suit what {workdir} trained; it can be exported as {right}")
    moved = {"encoder": args.encoder_weights, "autoencoder": args.autoencoder_weights}
    if args.format == ENCODER:
        if any(moved.values()):
            raise ValueError("--encoder-weights and --autoencoder-weights are for runs with frozen networks")
        networks = [_export_of(args, settings, kind, *network) for kind, network in trained.items()]
        count = sum(value.size for network in networks for value in network.params.values())
    else:
        settings = encoders.with_moved_weights(settings, meta["fingerprints"], **moved)
        state = releases.write(settings, params)
        count = sum(value.size for value in jax.tree.leaves(params))
    card = _model_card(workdir, config_io.to_dict(settings), meta, step, args)

    def fill(folder: pathlib.Path) -> None:
        if args.format == ENCODER:
            frozen.save_together(folder, networks, f"{args.weights} of step {step} of a lumos_jax run")
        else:
            _save_prior(folder, args.format, settings, state, step)
        card.save(folder / "README.md")

    _write(args.out, fill)
    return f"{count:,} parameters ({args.weights}) of step {step} in {args.out}"


def _model_card(workdir: pathlib.Path, settings: Any, meta: Any, step: int, args: argparse.Namespace) -> ModelCard:
    """What a run's weights are, how they were trained, and its latest metrics up to `step`."""

    def table(*rows):
        header, *rows = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
        return "\n".join([header, "| --- " * (header.count("|") - 1) + "|", *rows])

    title = "Trained encoders" if args.format == ENCODER else "A visual generative prior"
    head = ModelCardData(library_name="lumos_jax", tags=["diffusion", "text-free"]).to_yaml()
    parts = [f"---\n{head}\n---", f"# {title}"]
    parts += [f"Trained with lumos_jax for {step:,} steps; {_WEIGHTS[args.weights]}."]
    parts += [_LOADING[args.format].format(step=step)]
    if meta.get("imported"):
        parts.append(f"Imported from `{meta['imported']}`.")
    fingerprints = ((name, f"`{value}`") for name, value in meta["fingerprints"].items())
    parts += ["## Data and frozen networks", table(("what", "fingerprint"), *fingerprints)]
    metrics, path = {}, workdir / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        logged = json.loads(line)
        if logged["step"] <= step:
            metrics |= {n: (value, logged["step"]) for n, value in logged.items() if isinstance(value, int | float)}
    shown = [name for name in sorted(metrics) if name not in _LEFT_OUT and not name.startswith("goodput")]
    if shown:
        rows = ((name, f"{metrics[name][0]:.6g}", metrics[name][1]) for name in shown)
        parts += ["## Metrics", table(("metric", "value", "step"), *rows)]
    parts += ["## Settings", f"```json\n{json.dumps(settings, indent=2)}\n```"]
    return ModelCard("\n\n".join(parts) + "\n")


def _save_prior(folder: pathlib.Path, layout: str, settings: config.Settings, state: Any, step: int) -> None:
    metadata = {"format": "pt", releases.SETTINGS_KEY: json.dumps(config_io.to_dict(settings))}
    if layout == "official":
        torch_files.save(folder / f"lumos_{step}.pth", {"state_dict": state})
    elif layout == "safetensors":
        files.save_safetensors(state, folder / f"lumos_{step}.safetensors", metadata)
    else:
        inner = folder / "transformer"
        inner.mkdir()
        names = official.to_diffusers(state)
        files.save_safetensors(names, inner / "diffusion_pytorch_model.safetensors", metadata)
        size, patch = make_size(settings.model), settings.model.patch_size
        network = {
            "_class_name": "LumosTransformer2DModel",
            "num_attention_heads": size.heads,
            "attention_head_dim": size.width // size.heads,
            "num_layers": size.depth,
            "patch_size": patch,
            "sample_size": math.isqrt(state["pos_embed"].shape[1]) * patch,
            "in_channels": state["x_embedder.proj.weight"].shape[1],
            "out_channels": state["final_layer.linear.weight"].shape[0] // patch**2,
            "caption_channels": state["y_embedder.y_embedding"].shape[1],
            "interpolation_scale": position_scale(settings.data.image_size),
            "norm_type": "ada_norm_zero",
            "norm_eps": 1e-6,
            "activation_fn": "gelu-approximate",
        }
        (inner / "config.json").write_text(json.dumps(network, indent=2) + "\n", encoding="utf-8")
    config_io.save(settings, folder / "config.json")


def _export_of(
    args: argparse.Namespace, settings: config.Settings, kind: str, network: Any, params: Any
) -> frozen.Imported:
    """A trained encoder; one of images with what whitens its tokens."""
    if args.whiten and kind == "image-encoder":
        params = params | {"whitening": _whitening(settings, network, params, args.whiten)}
        network = dataclasses.replace(network, whitened=True)
    flat = {path: value.astype(args.dtype) for path, value in rules.flatten(params).items()}
    return frozen.Imported(kind, network, flat, None)


def _whitening(settings: config.Settings, vit: Any, params: Any, images: int) -> Any:
    """The statistics of so many images, evenly spaced in the source that the run was trained on."""
    source, enc = data.make_source(settings.data), settings.encoder
    records = np.linspace(0, len(source) - 1, min(images, len(source))).astype(int).tolist()
    encoder = encoders.ImageEncoder(vit, dataclasses.replace(enc, output="all", normalize="none"), identity="")
    apply = jax.jit(encoder.apply)

    def tokens():
        for begin in progress.bar(range(0, len(records), WHITENING_BATCH), unit="batch"):
            batch = data.read_batch(settings.data, source, records[begin : begin + WHITENING_BATCH])
            yield np.asarray(apply(params, batch["image"]))[batch["weight"] > 0]

    return whitening.fit(tokens())


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser(prog="python -m lumos_jax.convert", description=__doc__, formatter_class=raw)
    verbs = parser.add_subparsers(dest="verb", required=True)
    add = verbs.add_parser("import", help="released weights -> a run or a frozen network's directory").add_argument
    add("--kind", required=True, choices=(*releases.RELEASES, *frozen.KINDS), help="what the source holds")
    add("--source", required=True, help="file, directory or hub id")
    add("--out", help="the directory to make")
    add("--heads", type=int, default=0, help="attention heads, where neither the file nor the size tells")
    add("--encoder", help="of a prior: weights of the encoder that it conditions on, where they are not the usual ones")
    add("--autoencoder", help="of a prior: weights of its autoencoder, likewise")
    add("--dry-run", action="store_true", help="print the report from shapes alone, write nothing")
    add = verbs.add_parser("export", help="a run's weights -> files for others").add_argument
    add("--workdir", required=True, help="the run's directory")
    add("--out", required=True, help="the directory to make")
    formats = "official .pth (default), the same as safetensors, diffusers; or encoder, of a run that trained one"
    add("--format", choices=(*PRIOR_FORMATS, ENCODER), default="official", help=formats)
    add("--dtype", choices=("float32", "float16"), default="float32", help="of format encoder (float32)")
    white = "of format encoder, of images: images of the run's data that encoder.normalize=white is fitted to (2048); 0: none"
    add("--whiten", type=int, default=2048, metavar="IMAGES", help=white)
    add("--weights", choices=("ema", "params"), default="ema", help="the EMA (default) or the raw parameters")
    add("--encoder-weights", metavar="PATH", help="where the run's frozen encoder is now, if its files have moved")
    add("--autoencoder-weights", metavar="PATH", help="where its autoencoder is now")
    add("--checkpoint", type=int, metavar="STEP", help="default: the newest")
    return parser


def run(args: argparse.Namespace) -> Any:
    """Does what the command line says and returns what to print. Raises ValueError for a user's mistake."""
    if args.verb == "export" or not args.dry_run:  # checked before gigabytes are read
        if not args.out:
            raise ValueError("--out is missing: the directory to make (or --dry-run, to see the report alone)")
        if pathlib.Path(args.out).expanduser().exists():
            raise ValueError(f"--out={args.out} exists; give a new directory, or remove it")
    if args.verb == "export":
        return export(args)
    return import_prior(args) if args.kind in releases.RELEASES else import_frozen(args)


def main(arguments: list[str] | None = None) -> int:
    """Convert as the command line says; return the exit code."""
    return cli.call(lambda: print(run(_parser().parse_args(arguments))), CheckpointError)


if __name__ == "__main__":
    quiet_logs()
    sys.exit(main())
