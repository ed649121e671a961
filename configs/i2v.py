"""Image to video: the frames that follow a picture, from the image prior.

python -m lumos_jax.main --config=configs/i2v.py --config.init_from=RUN --config.data.path=openvid.csv --workdir=CLIPS
    DiT-XL/2 with attention over frames, 16 frames at 256 px, from an I2I prior of configs/i2i.py: for a TPU pod or a CUDA host.
    Neither Lumos's nor SVD's optimiser values for this are known; these are the prior's.
configs/i2v.py:desk   8 frames of scenes at 32 px, from a prior of configs/i2i.py:desk: about ten minutes on 2 CPU cores
configs/i2v.py:test   the same in seconds, from scratch

Clips of scenes have 6 frames a second and motion ids around 20: sample with --fps=6 --motion=20.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # config files are loaded by path, from anywhere

from configs import common, i2i


def _clips(config):
    common.set_task(config, "i2v")
    config.data.sample_type = "clip"
    config.data.crop = "center"
    config.data.flip = False
    config.eval.guidance = 2.5  # of the last frame; 1 at the first [SVD]
    return config


def paper():
    config = _clips(i2i.paper())
    config.data.source = "videos"
    config.data.crop = "random"
    config.data.clips.frames = 16
    config.data.clips.frame_stride = (2, 6)  # 4 to 12 frames a second of videos with 24
    config.data.clips.image_step_fraction = 0.25  # keeps the prior
    config.data.holdout = 2048
    config.model.remat = "full"
    config.train.steps = 100_000
    config.checkpoint.every = 2000
    config.eval.num_examples = 2048
    config.eval.num_scored = 256
    config.eval.sampler = "ddim"
    config.eval.steps = 50
    config.eval.sheet = (4, 1)
    return config


def desk():
    config = _clips(i2i.desk())
    config.data.clips.frames = 8
    config.data.clips.frame_stride = (3, 6)
    config.data.scenes.motion = "turntable"  # what the first frame does not tell, no clip can be compared with
    config.diffusion.logit_mean = 1.0  # in little noise the noisy frames themselves tell how things move
    config.data.holdout = 256
    config.eval.guidance = 1.5
    config.optimizer.learning_rate = 2e-3
    config.train.batch_size = 8
    config.train.steps = 1000
    config.eval.every = 250
    config.eval.num_examples = 128
    config.eval.num_scored = 64
    config.eval.sheet = (4, 1)
    return config


def test():
    config = _clips(i2i.test())
    config.data.clips.frames = 4
    config.data.clips.frame_stride = (4, 12)
    config.train.batch_size = 8
    config.eval.num_examples = 16
    config.eval.num_scored = 8
    config.data.holdout = 16
    return config


def get_config(size=""):
    return common.pick(size, {"": paper, "desk": desk, "test": test})
