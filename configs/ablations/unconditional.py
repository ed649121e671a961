"""Another prior: unconditional. The network sees the noisy latent and the timestep, and nothing else.

python -m lumos_jax.main --config=configs/ablations/unconditional.py --config.data.path=DIR --workdir=RUN
    the network of DiT-XL/2 at 256 px
configs/ablations/unconditional.py:desk   scenes: five minutes on 2 CPU cores
configs/ablations/unconditional.py:test   the same in seconds
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # config files are loaded by path, from anywhere

from configs import common, i2i


def without_condition(config):
    config.task.name = "unconditional"
    config.task.condition_dropout = 0.0
    config.eval.guidance = 1.0
    return config


def paper():
    return without_condition(i2i.paper())


def desk():
    return without_condition(i2i.desk())


def test():
    return without_condition(i2i.test())


def get_config(size=""):
    return common.pick(size, {"": paper, "desk": desk, "test": test})
