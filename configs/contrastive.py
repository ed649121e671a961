"""Contrastive training on captioned images (CLIP): an image encoder and a text encoder of one's own.

python -m lumos_jax.main --config=configs/contrastive.py --config.data.source=arrayrecord --config.data.path=DIR --workdir=RUN
    ViT-B/16 at 224 px and CLIP's text transformer, for a TPU pod or a CUDA host
configs/contrastive.py:desk   a ViT of 0.8 M parameters and a text transformer of 0.4 M on scenes and their captions, on a
    laptop CPU; also for any captioned images
configs/contrastive.py:test   the same in seconds

python -m lumos_jax.convert export --workdir=RUN --format=encoder --out=DIR
    makes a directory of both encoders that config.encoder.weights can name, for encoder.kind=vit and for clip_text
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # config files are loaded by path, from anywhere

from configs import common


def paper():
    config = common.base()
    common.set_task(config, "contrastive")
    config.data.source = "arrayrecord"
    config.data.sample_type = "captioned"
    config.data.holdout = 5120
    config.data.workers = 16
    config.encoder.weights = "random:0"
    config.encoder.size = "B"
    config.optimizer.learning_rate = 5e-4
    config.optimizer.weight_decay = 0.2
    config.optimizer.b2 = 0.98
    config.optimizer.eps = 1e-6
    config.optimizer.warmup_steps = 2000
    config.optimizer.decay = "cosine"
    config.optimizer.ema_decay = 0.999
    config.train.batch_size = 32_768
    config.train.steps = 390_000  # 32 times the paper's 400 million images
    config.eval.every = 5000
    config.eval.num_examples = 5120
    config.eval.sheet = (8, 5)
    return config


def desk():
    config = paper()
    config.data.source = "scenes"
    config.data.workers = 0
    config.data.image_size = 32
    config.data.holdout = 1024
    config.encoder.size = "128x4x4/8"
    config.encoder.image_size = 32
    config.task.text_size = "128x2x4"
    config.task.max_tokens = 64
    config.task.tokenizer = "scenes"
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 0.04
    config.optimizer.warmup_steps = 100
    config.optimizer.clip_norm = 3.0
    config.optimizer.ema_decay = 0.99
    config.train.batch_size = 128
    config.train.steps = 1200
    config.checkpoint.every = 250
    config.log.every = 50
    config.eval.every = 300
    config.eval.num_examples = 1024
    return config


def test():
    config = desk()
    common.shorten(config)
    config.data.holdout = 32
    config.encoder.size = "32x2x2/8"
    config.task.text_size = "32x2x2"
    config.task.max_tokens = 24
    config.eval.sheet = (2, 3)
    return config


def get_config(size=""):
    return common.pick(size, {"": paper, "desk": desk, "test": test})
