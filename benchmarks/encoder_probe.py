"""What the encoders that come with the package know of scenes, by linear probes of [CLS], and whether the text encoder tells
captions apart.

    python -m benchmarks.encoder_probe --encoders scenes scenes-moco scenes-clip random:0

Probes are ridge regressions on features of `--train` scenes, none of which an encoder was trained on, measured on `--test`
others: how often the largest output is right for the number of solids and for the color and shape of the largest one, and the
area under the ROC curve, averaged over colors and over shapes, for which of them are present. An encoder with a text encoder
beside it is also asked for the caption of each test scene: among all of them, and against the same caption with the colors of
two solids, or their shapes, exchanged.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re

import jax
import numpy as np

from lumos_jax import config, data, encoders, evaluation
from lumos_jax.encoders import frozen
from lumos_jax.scenes import scene as scenes

FIRST = 2**31  # far from the scenes that the encoders were trained on
RIDGE = 1e-2  # of the variance of the features
RANDOM_SIZE = "128x4x4/8"
BATCH, SIDE, TOKENS = 256, 32, 64


def probe(train: np.ndarray, targets: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Ridge regression of targets (N, T) on features (N, D), standardized -> outputs (M, T) for test features (M, D)."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    gram = train.T @ train / len(train) + RIDGE * np.eye(train.shape[1])
    center = targets.mean(0)
    return test @ np.linalg.solve(gram, train.T @ (targets - center) / len(train)) + center


def area(scores: np.ndarray, present: np.ndarray) -> float:
    """Area under the ROC curve: how often a scene with the thing scores above one without."""
    ranks = np.argsort(np.argsort(scores)) + 1
    positives = present.sum()
    return float((ranks[present].sum() - positives * (positives + 1) / 2) / (positives * (len(present) - positives)))


def probes(features: np.ndarray, made: list[scenes.Scene], count: int) -> dict[str, float]:
    """Scores of probes of features (N, D) of scenes, fitted to the first `count`."""
    found = {}
    labels = {
        "count": [len(scene.solids) - 1 for scene in made],
        "largest_color": [list(scenes.COLORS).index(scenes.largest(scene).color) for scene in made],
        "largest_shape": [scenes.KINDS.index(scenes.largest(scene).kind) for scene in made],
    }
    for name, label in labels.items():
        label = np.array(label)
        outputs = probe(features[:count], np.eye(label.max() + 1)[label[:count]], features[count:])
        found[name] = float((outputs.argmax(1) == label[count:]).mean())
    for name, values, field in (("colors", scenes.COLORS, "color"), ("shapes", scenes.KINDS, "kind")):
        present = np.array([[any(getattr(s, field) == v for s in scene.solids) for v in values] for scene in made])
        outputs = probe(features[:count], present[:count].astype(float), features[count:])
        found[name] = float(np.mean([area(outputs[:, n], present[count:, n]) for n in range(len(values))]))
    return found


def exchanged(caption: str, words: tuple[str, ...]) -> str | None:
    """The caption with the first two different words among `words` exchanged; None if there are not two."""
    found = list(dict.fromkeys(re.findall(rf"\b({'|'.join(words)})\b", caption)))[:2]
    if len(found) < 2:
        return None
    other = dict(zip(found, reversed(found), strict=True))
    return re.sub(rf"\b({'|'.join(found)})\b", lambda match: other[match[0]], caption)


def caption_scores(weights: str, images: np.ndarray, captions: list[str]) -> dict[str, float]:
    """Retrieval among all of the images (N, H, W, 3) and captions, and how often the true caption is nearer than another with
    two words exchanged."""
    settings = config.Encoder(weights=weights, output="pooled", normalize="unit", image_size=SIDE)
    image_features = embed_images(settings, images)
    text = config.Encoder(kind="clip_text", weights=weights, output="pooled", tokenizer="scenes", max_tokens=TOKENS)
    encoder, params = encoders.make_text_encoder(text)
    tokenizer, apply = encoders.make_tokenizer(text, encoder), jax.jit(encoder.apply)

    def embed(texts):
        parts = [texts[first : first + BATCH] for first in range(0, len(texts), BATCH)]
        padded = [encoders.tokenize(tokenizer, part + [""] * (BATCH - len(part)), TOKENS) for part in parts]
        features = np.concatenate([apply(params, p["tokens"], p["token_mask"])[:, 0] for p in padded])[: len(texts)]
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    text_features = embed(captions)
    found = evaluation.retrieval_accuracy(image_features, text_features, np.array(captions))
    for name, words in (("colors", tuple(scenes.COLORS)), ("shapes", scenes.KINDS)):
        pairs = [(n, other) for n, caption in enumerate(captions) if (other := exchanged(caption, words))]
        rows = np.array([n for n, _ in pairs])
        right, wrong = text_features[rows], embed([other for _, other in pairs])
        found[f"{name}_in_place"] = float((((right - wrong) * image_features[rows]).sum(1) > 0).mean())
    return found


def embed_images(settings: config.Encoder, images: np.ndarray) -> np.ndarray:
    """The first token of each image, (N, D)."""
    encoder, params = encoders.make_encoder(settings)
    apply = jax.jit(encoder.apply)
    parts = (images[first : first + BATCH] for first in range(0, len(images), BATCH))
    return np.concatenate([np.asarray(apply(params, part))[:, 0] for part in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--encoders", nargs="+", default=[*frozen.SHIPPED, "random:0"], help="as config.encoder.weights"
    )
    parser.add_argument("--train", type=int, default=4096)
    parser.add_argument("--test", type=int, default=1024)
    args = parser.parse_args()
    settings = config.Data(image_size=SIDE, sample_type="captioned", scenes=config.Scenes(2**32))
    source, total = data.make_source(settings), args.train + args.test
    records = range(FIRST, FIRST + total)
    images = np.stack([source.read(record) for record in records])
    made = data.scenes_of(source, records)
    for weights in args.encoders:
        fields = {"size": RANDOM_SIZE} if weights.startswith("random:") else {}
        encoder = config.Encoder(weights=weights, output="cls", normalize="none", image_size=SIDE, **fields)
        found = probes(embed_images(encoder, images), made, args.train)
        folder = frozen.SHIPPED.get(weights, pathlib.Path(weights))
        if (folder / "clip-text").is_dir():
            for kind, number in (("short", 0), ("detailed", 1)):
                captions = [scenes.captions(scene)[number] for scene in made[args.train :]]
                scores = caption_scores(weights, images[args.train :], captions)
                found |= {f"{kind}_{name}": score for name, score in scores.items()}
        print(json.dumps({"encoder": weights} | {name: round(score, 4) for name, score in found.items()}), flush=True)


if __name__ == "__main__":
    main()
