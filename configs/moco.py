"""MoCo v3: an image encoder of one's own, from images alone.

python -m lumos_jax.main --config=configs/moco.py --config.data.source=arrayrecord --config.data.path=DIR --workdir=RUN
    ViT-B/16 at 224 px with the paper's batch, temperature and learning rate, for a TPU pod or a CUDA host
configs/moco.py:desk   a ViT of 0.8 M parameters on scenes at 32 px, on a laptop CPU; also for any folder of images
configs/moco.py:test   the same in seconds

python -m lumos_jax.convert export --workdir=RUN --format=encoder --out=DIR
    makes a directory of the trained encoder that config.encoder.weights can name
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # config files are loaded by path, from anywhere

from configs import common, dino


def paper():
    config = dino.paper()
    common.set_task(config, "moco")
    config.optimizer.learning_rate = 2.4e-3  # 1.5e-4 for every 256 images of a batch
    config.optimizer.weight_decay = 0.1
    config.optimizer.ema_decay = 0.99
    config.optimizer.clip_norm = 0.0
    config.train.batch_size = 4096
    return config


def _small(config):
    common.set_task(config, "moco")
    config.task.crop_scale = (0.4, 1.0)  # smaller views show other solids than their image
    config.task.head = (256, 64)
    return config


def desk():
    config = _small(dino.desk())
    config.data.image_size = 32
    config.train.batch_size = 128
    config.train.steps = 1000
    config.checkpoint.every = config.eval.every = 250
    return config


def test():
    config = _small(dino.test())
    config.task.head = (32, 8)
    return config


def get_config(size=""):
    return common.pick(size, {"": paper, "desk": desk, "test": test})
