"""Whose features of the captions text-to-image training is conditioned on.

python -m lumos_jax.main --config=configs/ablations/text_encoders.py:VARIANT --config.data.path=DIR --workdir=RUN
    t5          T5 v1.1 XXL, 120 tokens
    clip_text   CLIP ViT-L/14's text encoder, its 77 tokens
configs/ablations/text_encoders.py:desk,VARIANT   on scenes: a small T5 of random weights, and the text encoder that
    configs/contrastive.py trained on scenes and their captions, which comes with the package: about ten minutes on 2 CPU cores
configs/ablations/text_encoders.py:test,VARIANT   the same in seconds
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # config files are loaded by path, from anywhere

from configs import common, t2i


def _t5(config, size):
    config.encoder.kind = "t5"


def _clip_text(config, size):
    config.encoder.kind = "clip_text"
    config.encoder.weights = "scenes-clip" if size else "openai/clip-vit-large-patch14"
    config.encoder.max_tokens = min(config.encoder.max_tokens, 64 if size else 77)


def get_config(name=""):
    sizes = {"": t2i.paper, "desk": t2i.desk, "test": t2i.test}
    return common.vary(name, sizes, {"t5": _t5, "clip_text": _clip_text})
