"""Image to image, the prior: reproduce images from their frozen DINO features.

python -m lumos_jax.main --config=configs/i2i.py --config.data.source=arrayrecord --config.data.path=DIR --workdir=RUN
    DiT-XL/2 (822 M parameters) at 256 px on SD VAE latents and DINO ViT-B/16 [CLS]: the paper's scale, for a TPU pod or a
    CUDA host. Lumos's own optimiser values are unknown; these are DiT's.
configs/i2i.py:desk   scenes at 32 px, pixels as latents: about ten minutes on 2 CPU cores
configs/i2i.py:test   the same in seconds
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # config files are loaded by path, from anywhere

from configs import common


def paper():
    config = common.base()
    config.data.source = "arrayrecord"
    config.data.crop = "random"
    config.data.flip = True
    config.data.holdout = 5120
    config.data.workers = 16
    config.train.batch_size = 256
    config.train.steps = 400_000
    config.optimizer.learning_rate = 1e-4
    config.eval.every = 10_000
    config.eval.num_examples = 5120
    return config


def desk():
    config = common.base()
    config.data.source = "scenes"
    config.data.image_size = 32
    config.data.holdout = 512
    common.shipped_encoder(config)
    config.encoder.output = "all"  # 17 tokens say within minutes what is where; [CLS] alone takes a prior far longer
    config.autoencoder.weights = "identity"
    config.model.size = "128x4x4"
    config.model.patch_size = 4
    config.model.dtype = "float32"
    # Pixels of a patch are many numbers for a network this narrow: predicting them gives clean pictures within minutes, where
    # noise or v, which holds the noise, stays speckled.
    config.diffusion.schedule = "cosine"
    config.diffusion.prediction = "x0"
    config.diffusion.timesteps = "logit_normal"  # the middle of the way, where shapes and edges are decided
    config.diffusion.loss = "simple"
    config.optimizer.name = "muon"  # as good as AdamW in half the steps here
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.decay = "cosine"
    config.optimizer.clip_norm = 1.0
    config.optimizer.b2 = 0.99
    config.optimizer.ema_decay = 0.995
    config.train.batch_size = 32  # more steps in the same time: at this budget they matter more than a larger batch
    config.train.steps = 3000
    config.checkpoint.every = 500
    config.log.every = 100
    config.eval.every = 750
    config.eval.num_examples = 256
    config.eval.num_scored = 128
    config.eval.guidance = 1.5
    return config


def test():
    config = desk()
    common.shorten(config)
    config.data.holdout = 32
    config.encoder.weights = "random:0"
    config.encoder.size = "32x2x4/8"
    config.encoder.normalize = "none"
    config.model.size = "32x2x2"
    config.optimizer.learning_rate = 2e-3
    config.eval.num_scored = 0
    config.eval.sheet = (2, 2)
    config.eval.steps = 4
    return config


def get_config(size=""):
    return common.pick(size, {"": paper, "desk": desk, "test": test})
