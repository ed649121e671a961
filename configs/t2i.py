"""Text to image: the prior, handed over to captions that a frozen text encoder reads.

python -m lumos_jax.main --config=configs/t2i.py --config.init_from=RUN_OF_I2I --config.data.path=DIR --workdir=RUN
    DiT-XL/2 at 256 px on SD VAE latents and T5 v1.1 XXL features of 120 tokens: the paper's scale, for a TPU pod or a CUDA
    host; 65k steps. The optimiser's values are PixArt's, Lumos's own are unknown. The text encoder has 4.8 billion
    parameters: with a cache (python -m lumos_jax.prepare cache) training does without it.
configs/t2i.py:512    the same at 512 px: the second stage, with --config.init_from=RUN_AT_256
configs/t2i.py:1024   the third, with --config.init_from=RUN_AT_512: around 1024 px in 40 aspect buckets, each batch of one of
    them, with size and ratio as conditions and positions at half the pace; the batch is smaller, for it is 16 times the pixels
configs/t2i.py:desk   scenes at 32 px and a small random text encoder: about ten minutes on 2 CPU cores; start it from
    configs/i2i.py:desk with --config.init_from=runs/desk. Each evaluation prints how many samples show what their captions say
    (docs/evaluation.md)
configs/t2i.py:test   the same in seconds
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # config files are loaded by path, from anywhere

from configs import common, i2i


def paper():
    config = i2i.paper()
    config.task.name = "t2i"
    config.data.sample_type = "captioned"
    config.data.flip = False  # captions tell left from right
    config.data.captions.clean = True
    config.encoder.kind = "t5"
    config.encoder.weights = "google/t5-v1_1-xxl"
    config.encoder.output = "all"
    config.encoder.max_tokens = 120
    config.train.steps = 65_000
    config.optimizer.learning_rate = 2e-5
    config.optimizer.weight_decay = 0.03
    config.optimizer.eps = 1e-10
    config.optimizer.warmup_steps = 1000
    config.optimizer.clip_norm = 0.01
    return config


def paper_512():
    config = paper()
    config.data.image_size = 512
    return config


def paper_1024():
    config = paper()
    config.data.image_size = 1024
    config.data.crop = "center"
    config.data.aspect_ratios = (0.25, 4.0)
    config.train.batch_size = 64
    config.eval.num_examples = 1024
    return config


def _words(config, width):
    """A random text encoder for the words of scenes: it tells words and their neighbours apart, which is what they need."""
    config.task.name = "t2i"
    config.data.sample_type = "captioned"
    encoder = common.base().encoder
    encoder.kind = "t5"
    encoder.weights = "random:0"
    encoder.tokenizer = "scenes"
    encoder.size = f"{width}x2x4"
    encoder.output = "all"
    config.encoder = encoder
    return config


def desk():
    config = _words(i2i.desk(), 128)
    # Short captions: with detailed ones mixed in, a step takes a third longer and count and shape are learned later.
    config.data.captions.detailed_caption_prob = 0.0
    config.encoder.max_tokens = 24
    config.diffusion.logit_mean = 1.0  # what stands where is decided in the noise, and captions are asked there
    config.optimizer.learning_rate = 2e-3  # gentler than the prior's own, so that it is not unlearned
    config.train.steps = 4000
    config.eval.every = 1000
    config.eval.guidance = 3.0
    config.eval.num_scored = 128
    return config


def test():
    config = _words(i2i.test(), 32)
    config.encoder.max_tokens = 24
    config.eval.num_scored = 16
    return config


def get_config(size=""):
    return common.pick(size, {"": paper, "512": paper_512, "1024": paper_1024, "desk": desk, "test": test})
