"""Whose features the I2I prior is conditioned on: [CLS] of DINO, MoCo-v3 or CLIP, of ViT-B/16 each.

python -m lumos_jax.main --config=configs/ablations/encoders.py:VARIANT --config.data.path=DIR --workdir=RUN
    dino    what Lumos conditions on
    moco    MoCo-v3's training checkpoint, which is on no hub: --config.encoder.weights=FILE says where it is
    clip    trained with captions
configs/ablations/encoders.py:desk,VARIANT   on scenes. dino is the shipped ViT; moco and clip have no small weights: they
    are the networks above at 224 px, which a CPU should run once over the scenes (python -m lumos_jax.prepare cache)
configs/ablations/encoders.py:test,VARIANT   the same for a dozen steps
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # config files are loaded by path, from anywhere

from configs import common, i2i

WEIGHTS = {"dino": "facebook/dino-vitb16", "moco": "moco_v3_vit_b.pth.tar", "clip": "openai/clip-vit-base-patch16"}


def _set(name):
    def change(config, size):
        if size and name == "dino":
            common.shipped_encoder(config)
        else:
            config.encoder = common.base().encoder
            config.encoder.weights = WEIGHTS[name]
            config.encoder.interpolation = "bicubic" if name == "clip" else "bilinear"
        config.encoder.output = "cls"

    return change


def get_config(name=""):
    sizes = {"": i2i.paper, "desk": i2i.desk, "test": i2i.test}
    return common.vary(name, sizes, {encoder: _set(encoder) for encoder in WEIGHTS})
