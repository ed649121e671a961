"""Another prior: RCG. One self-supervised feature of the image is added to the timestep embedding; there is no cross-attention.

python -m lumos_jax.main --config=configs/ablations/rcg.py --config.encoder.weights=MOCO --config.data.path=DIR --workdir=RUN
    DiT-XL/2 at 256 px on MoCo-v3 ViT-B's projector (MOCO: its training checkpoint, which is on no hub)
configs/ablations/rcg.py:desk   scenes, and [CLS] of the shipped self-supervised ViT: five minutes on 2 CPU cores
configs/ablations/rcg.py:test   the same in seconds
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # config files are loaded by path, from anywhere

from configs import common, i2i


def paper():
    config = i2i.paper()
    config.task.name = "rcg"
    config.encoder.weights = "moco_v3_vit_b.pth.tar"
    config.encoder.output = "pooled"
    config.encoder.normalize = "standard"
    config.encoder.interpolation = "bicubic"
    config.model.activation = "gelu"  # RCG's own choice; DiT's and Lumos's is its tanh approximation
    return config


def _on_scenes(config):
    config.task.name = "rcg"
    common.shipped_encoder(config)
    config.encoder.output = "cls"
    config.encoder.normalize = "standard"
    return config


def desk():
    return _on_scenes(i2i.desk())


def test():
    return _on_scenes(i2i.test())


def get_config(size=""):
    return common.pick(size, {"": paper, "desk": desk, "test": test})
