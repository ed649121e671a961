"""Text to image with and without representation alignment (REPA) to a self-supervised ViT; start it from an I2I prior.

python -m lumos_jax.main --config=configs/ablations/alignment.py:VARIANT --config.init_from=RUN_OF_I2I ... --workdir=RUN
    0 (none), 0.25, 0.5 (REPA's) or 1: the weight of the cosine similarity; with DINO ViT-B/16, after block 8 of 28
configs/ablations/alignment.py:desk,VARIANT   on scenes, with the shipped ViT, after block 2 of 4
configs/ablations/alignment.py:test,VARIANT   the same in seconds
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # config files are loaded by path, from anywhere

from configs import common, t2i

WEIGHTS = ("0", "0.25", "0.5", "1")


def _set(weight):
    def change(config, size):
        config.align.weight = float(weight)
        if size:
            config.align.block = 2
            config.align.encoder.weights = "scenes"
            config.align.encoder.normalize = "white"
            config.align.encoder.image_size = config.data.image_size

    return change


def get_config(name=""):
    sizes = {"": t2i.paper, "desk": t2i.desk, "test": t2i.test}
    return common.vary(name, sizes, {weight: _set(weight) for weight in WEIGHTS})
