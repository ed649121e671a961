"""Another prior: class-conditional, as DiT. Its class is added to the timestep embedding; there is no cross-attention.

python -m lumos_jax.main --config=configs/ablations/class_conditional.py --workdir=RUN
    DiT-XL/2 on ImageNet (TFDS imagenet2012, 1000 classes) at 256 px
configs/ablations/class_conditional.py:desk   scenes, 40 classes (by the largest solid): five minutes on 2 CPU cores
configs/ablations/class_conditional.py:test   the same in seconds
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # config files are loaded by path, from anywhere

from configs import common, i2i


def classes(config, count):
    config.task.name = "class_conditional"
    config.data.sample_type = "labeled"
    config.data.num_classes = count
    return config


def paper():
    config = classes(i2i.paper(), 1000)
    config.data.source = "tfds"
    config.data.tfds.name = "imagenet2012"
    return config


def desk():
    return classes(i2i.desk(), 40)


def test():
    return classes(i2i.test(), 40)


def get_config(size=""):
    return common.pick(size, {"": paper, "desk": desk, "test": test})
