"""Whose features the I2I prior is conditioned on: [CLS] of DINO, MoCo-v3 or CLIP, of ViT-B/16 each.

python -m lumos_jax.main --config=configs/ablations/encoders.py:VARIANT --config.data.path=DIR --workdir=RUN
    dino    what Lumos conditions on
    moco    MoCo-v3's training checkpoint, which is on no hub: --config.encoder.weights=FILE says where it is
    clip    trained with captions
configs/ablations/encoders.py:desk,VARIANT   on scenes, of the small ViTs that come with the package, trained on scenes by
    configs/dino.py, configs/moco.py and configs/contrastive.py: about ten minutes on 2 CPU cores
configs/ablations/encoders.py:test,VARIANT   the same in seconds
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # config files are loaded by path, from anywhere

from configs import common, i2i

WEIGHTS = {"dino": "facebook/dino-vitb16", "moco": "moco_v3_vit_b.pth.tar", "clip": "openai/clip-vit-base-patch16"}
SHIPPED = {"dino": "scenes", "moco": "scenes-moco", "clip": "scenes-clip"}


def _set(name):
    def change(config, size):
        if size:
            common.shipped_encoder(config)
            config.encoder.weights = SHIPPED[name]
        else:
            config.encoder = common.base().encoder
            config.encoder.weights = WEIGHTS[name]
            config.encoder.interpolation = "bicubic" if name == "clip" else "bilinear"
        config.encoder.output = "cls"

    return change


def get_config(name=""):
    sizes = {"": i2i.paper, "desk": i2i.desk, "test": i2i.test}
    return common.vary(name, sizes, {encoder: _set(encoder) for encoder in WEIGHTS})
