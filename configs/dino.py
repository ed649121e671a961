"""Self-distillation (DINO): an image encoder of one's own, from images alone.

python -m lumos_jax.main --config=configs/dino.py --config.data.source=arrayrecord --config.data.path=DIR --workdir=RUN
    ViT-B/16 at 224 px with DINO's crops and temperatures, for a TPU pod or a CUDA host
configs/dino.py:desk   a ViT of 0.8 M parameters on scenes at 32 px, on a laptop CPU; also for any folder of images
configs/dino.py:test   the same in seconds

python -m lumos_jax.convert export --workdir=RUN --format=encoder --out=DIR
    makes a directory of the trained encoder that config.encoder.weights can name
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # config files are loaded by path, from anywhere

from configs import common


def paper():
    config = common.base()
    common.set_task(config, "dino")
    config.data.source = "arrayrecord"
    config.data.holdout = 5120
    config.data.workers = 16
    config.encoder.weights = "random:0"
    config.encoder.size = "B"
    config.task.head = (2048, 256, 65536)  # hidden layers, bottleneck, prototypes
    config.optimizer.learning_rate = 2e-3  # 5e-4 for every 256 images of a batch
    config.optimizer.weight_decay = 0.04
    config.optimizer.warmup_steps = 12_500
    config.optimizer.decay = "cosine"
    config.optimizer.clip_norm = 3.0
    config.optimizer.ema_decay = 0.996
    config.train.batch_size = 1024
    config.train.steps = 125_000
    config.eval.every = 5000
    config.eval.num_examples = 1024  # by their neighbors among the rest of the holdout
    config.eval.sheet = (8, 5)
    return config


def desk():
    config = paper()
    config.data.source = "scenes"
    config.data.workers = 0
    config.data.image_size = 48
    config.data.holdout = 3072
    config.encoder.size = "128x4x4/8"
    config.encoder.image_size = 32
    config.task.global_scale, config.task.local_scale = (0.6, 1.0), (0.3, 0.7)
    config.task.local_crops = 2
    config.task.head = (256, 64, 512)
    config.task.teacher_temperature = 0.06
    config.task.balance = "sinkhorn"  # centring needs more than minutes to leave a few clusters
    # Features that a prior is to reproduce pictures from must keep them: patches tell their pixels, and some are hidden.
    config.task.mask_weight, config.task.mask_share = 1.0, (0.0, 0.3)
    config.task.pixel_weight = 10.0
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.b2 = 0.99
    config.optimizer.warmup_steps = 100
    config.optimizer.ema_decay = 0.99
    config.train.batch_size = 64
    config.train.steps = 3000
    config.checkpoint.every = 500
    config.log.every = 50
    config.eval.every = 500
    return config


def test():
    config = desk()
    common.shorten(config)
    config.data.holdout = 64
    config.encoder.size = "32x2x2/8"
    config.task.head = (32, 8, 16)
    config.eval.sheet = (2, 3)
    return config


def get_config(size=""):
    return common.pick(size, {"": paper, "desk": desk, "test": test})
