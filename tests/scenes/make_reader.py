"""Makes lumos_jax/scenes/reader.safetensors, which reads solids off pictures of scenes.

    python tests/scenes/make_reader.py          # fits (a minute), saves, and prints the accuracy on other scenes
    python tests/scenes/make_reader.py --check  # the accuracy alone

It stands here because `evaluation` must not import `data`; a test holds the names in the file against those of scenes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file
from scipy import ndimage

from lumos_jax.scenes import reader as scene_check
from lumos_jax.scenes import render as scene_render
from lumos_jax.scenes.scene import COLORS, KINDS, make_scene

SIZES = (32, 48, 32, 64)
FIT_SEED, HELD_OUT_SEED = 1, 2
NAMES = list(COLORS)
# What a part can be: nothing, a solid, or two of one colour that touch in the picture.
CONTENTS = [*itertools.chain(*(itertools.combinations_with_replacement(KINDS, number) for number in (0, 1, 2)))]
WIDTHS = (96, 32)


def labeled(count: int, seed: int):
    """Of scenes 0 .. count - 1, at a size in turn: (scene, picture, owner (S, S) int, -1 where there is no solid).

    In every third, solids often have the colour of the one before them, so that there are enough that run together;
    another third is noisy, as samples are.
    """
    rng = np.random.default_rng(seed)
    for index in range(count):
        scene, size = make_scene(index, seed=seed), SIZES[index // 3 % len(SIZES)]
        if index % 3 == 0:
            solids = list(scene.solids)
            for i in range(1, len(solids)):
                if rng.random() < 0.5:
                    solids[i] = dataclasses.replace(solids[i], color=solids[i - 1].color)
            scene = dataclasses.replace(scene, solids=tuple(solids))
        picture = scene_render.render(scene, size)
        if index % 3 == 1:
            picture = to_bytes(picture + rng.normal(0, rng.uniform(0, 12), picture.shape))
        shares = coverage(scene, size)
        yield scene, picture, np.where(shares.max(0) > 0.5, shares.argmax(0), -1)


def to_bytes(picture: np.ndarray) -> np.ndarray:
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def clutter(count: int, seed: int):
    """The same of what shows no solid, as samples of an untrained network: noise, fine or in blots, or nearly one colour."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        size = SIZES[index // 3 % len(SIZES)]
        noise = rng.normal(size=(size, size, 3))
        if index % 3:
            noise = ndimage.gaussian_filter(noise, (*[rng.uniform(0.5, size / 10)] * 2, 0))
        noise *= rng.uniform(0.1, 0.6) / noise.std()
        noise = rng.random(3) + 0.1 * noise if index % 3 == 1 else 0.5 + noise
        yield None, to_bytes(noise * 255), np.full((size, size), -1)


def coverage(scene, size: int) -> np.ndarray:
    """Share (solids, size, size) of each pixel that each solid covers."""
    fine = scene_render.SUPERSAMPLE
    matrix = scene_render.camera_matrix(scene.camera)
    rays, centre = scene_render.cast(matrix, size * fine, size * fine)
    owner = scene_render.cover(
        scene, matrix, rays, centre, scene_render.ground_depth(rays[2], centre).astype(np.float32)
    )
    numbers = np.arange(len(scene.solids))[:, None, None]
    return (owner == numbers).reshape(-1, size, fine, size, fine).mean((2, 4))


def fit_table(examples) -> np.ndarray:
    """Colour of each cell: the most frequent among pixels that fell into it, or into the nearest cells that had any."""
    counts = np.zeros((len(COLORS) + 1, scene_check.CELLS**3))
    for scene, picture, owner in examples:
        colours = np.array([0] + [NAMES.index(solid.color) + 1 for solid in scene.solids])
        np.add.at(counts, (colours[owner + 1], scene_check.cells(picture)), 1)
    counts = counts.reshape(-1, *[scene_check.CELLS] * 3)
    counts = np.stack([ndimage.gaussian_filter(c, 0.4) for c in counts])
    seen = counts.sum(0) > 0.5
    nearest = ndimage.distance_transform_edt(~seen, return_distances=False, return_indices=True)
    return counts.argmax(0)[tuple(nearest)].astype(np.uint8).ravel()


def part_examples(examples, table: np.ndarray):
    """Features (P, C) and labels (P,), of CONTENTS, of parts: the solids of its colour that it shows more than half of."""
    features, labels = [], []
    for scene, picture, owner in examples:
        solids = scene.solids if scene else ()
        for colour, mask, seen in scene_check.parts(picture, table):
            inside = [
                solid.kind
                for number, solid in enumerate(solids)
                if solid.color == NAMES[colour] and (mine := owner == number).sum() < 2 * (mine & mask).sum()
            ]
            content = tuple(sorted(inside, key=KINDS.index))
            if content in CONTENTS:  # three in one are rare
                features.append(seen)
                labels.append(CONTENTS.index(content))
    return np.stack(features), np.array(labels)


def fit_network(features: np.ndarray, labels: np.ndarray, steps: int = 5000, batch: int = 256):
    """A perceptron by AdamW; crops are mirrored at random, which changes no kind."""
    rng = np.random.default_rng(0)
    widths = (features.shape[1], *WIDTHS, len(CONTENTS))
    params = {}
    for i, (a, b) in enumerate(itertools.pairwise(widths), 1):
        params |= {f"w{i}": rng.normal(0, np.sqrt(2 / a), (a, b)).astype(np.float32), f"b{i}": np.zeros(b, np.float32)}
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=0.05)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, x, y, key):
        def loss(params):
            hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
            keep = jax.random.bernoulli(key, 0.8, hidden.shape)
            hidden = jax.nn.relu(jnp.where(keep, hidden / 0.8, 0) @ params["w2"] + params["b2"])
            return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["w3"] + params["b3"], y).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    pixels = 4 * scene_check.CROP**2
    features = features.astype(np.float16)
    for number in range(steps):
        rows = rng.integers(len(features), size=batch)
        x = features[rows].astype(np.float32)
        mirrored = rng.random(batch) < 0.5
        crops = x[mirrored, :pixels].reshape(-1, 4, scene_check.CROP, scene_check.CROP)
        x[mirrored, :pixels] = crops[..., ::-1].reshape(len(crops), pixels)
        x[mirrored, pixels + 3] = 1 - x[mirrored, pixels + 3]
        params, state, value = step(params, state, x, labels[rows], jax.random.key(number))
        if number % 1000 == 0 or number == steps - 1:
            print(f"step {number}  loss {value:.3f}", flush=True)
    return {name: np.asarray(value) for name, value in params.items()}


def fit(scenes: int = 6_000, noise: int = 150) -> None:
    examples = list(labeled(scenes, FIT_SEED))
    table = fit_table(examples)
    features, labels = part_examples([*examples, *clutter(noise, FIT_SEED)], table)
    print(f"{len(labels)} parts, {np.bincount(labels, minlength=len(CONTENTS))} of {CONTENTS}", flush=True)
    params = fit_network(features, labels)
    params = {name: value.astype(np.float16) for name, value in params.items()}
    names = {"colours": json.dumps(NAMES), "contents": json.dumps(CONTENTS)}
    save_file({"table": table, **params}, scene_check.FILE, metadata=names)


def check(size: int, count: int = 1000) -> dict[str, float]:
    """Scores of true pictures of scenes that nothing was fitted to: the most that any model can be given."""
    scenes = [make_scene(index, seed=HELD_OUT_SEED) for index in range(count)]
    values = scene_check.caption_agreement(np.stack([scene_render.render(scene, size) for scene in scenes]), scenes)
    return {name: float(value.mean()) for name, value in values.items()}


if __name__ == "__main__":
    if "--check" not in sys.argv[1:]:
        fit()
    for size in (32, 64):
        print(f"{size} px", "  ".join(f"{name} {value:.3f}" for name, value in check(size).items()))
