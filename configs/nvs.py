"""Novel view synthesis from a prior: one picture and how the camera moves -> the picture from there.

python -m lumos_jax.main --config=configs/nvs.py --config.data.path=DIR --config.init_from=PRIOR --workdir=RUN
    DiT-XL/2 at 256 px on renders of Objaverse, for a TPU pod or a CUDA host. Lumos's own optimiser values are unknown; the
    rate, ten times as high for the camera projection, is Zero-1-to-3's.
configs/nvs.py:desk   scenes at 32 px, from an I2I desk prior (--config.init_from=runs/desk): about ten minutes on 2 CPU cores
configs/nvs.py:test   the same in seconds
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # config files are loaded by path, from anywhere

from configs import common, i2i


def _of_views(config):
    common.set_task(config, "nvs")
    config.data.sample_type = "views"
    config.optimizer.lr_multipliers = (("camera/project/*", 10.0),)
    config.eval.sampler, config.eval.steps, config.eval.guidance = "ddim", 50, 3.0
    return config


def paper():
    config = _of_views(common.base())
    config.data.source = "objaverse"
    config.data.holdout = 5120
    config.data.workers = 16
    config.train.batch_size = 256
    config.train.steps = 100_000
    config.optimizer.learning_rate = 1e-4
    config.eval.every = 10_000
    config.eval.num_examples = 5120
    return config


def desk():
    config = _of_views(i2i.desk())
    config.task.camera = "bilinear"
    config.data.scenes.max_view_angle = 60.0  # all round takes longer than minutes
    # Where things are is decided in the noise: at the prior's timesteps the noisy picture itself tells which way the camera
    # went, and nothing makes the network ask the camera.
    config.diffusion.logit_mean = 1.5
    config.optimizer.learning_rate = 2e-3
    config.train.steps = 4000
    config.eval.every = 1000
    config.eval.num_scored = 128
    config.eval.steps = 10  # as good as 50 here
    config.eval.guidance = 1.5
    return config


def test():
    config = _of_views(i2i.test())
    config.task.camera = "bilinear"
    config.eval.num_scored = 16
    config.eval.steps = 4
    return config


def get_config(size=""):
    return common.pick(size, {"": paper, "desk": desk, "test": test})
