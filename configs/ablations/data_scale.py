"""How many images the I2I prior learns from, at equal steps.

python -m lumos_jax.main --config=configs/ablations/data_scale.py:VARIANT --workdir=RUN
    1%, 10% or 100% of ImageNet (TFDS imagenet2012). Of shards of your own, name a share by a glob:
    --config.data.source=arrayrecord --config.data.path="DIR/train-000*"
configs/ablations/data_scale.py:desk,VARIANT   that share of 100,000 scenes: five minutes on 2 CPU cores
configs/ablations/data_scale.py:test,VARIANT   of 1,000, in seconds
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # config files are loaded by path, from anywhere

from configs import common, i2i

VARIANTS = (1, 10, 100)
SCENES = {"desk": 100_000, "test": 1000}


def _set(percent):
    def change(config, size):
        if size:
            config.data.scenes.num_scenes = SCENES[size] * percent // 100 + config.data.holdout
        else:
            config.data.source = "tfds"
            config.data.tfds.name = "imagenet2012"
            config.data.tfds.split = f"train[:{percent}%]"

    return change


def get_config(name=""):
    sizes = {"": i2i.paper, "desk": i2i.desk, "test": i2i.test}
    return common.vary(name, sizes, {f"{percent}%": _set(percent) for percent in VARIANTS})
