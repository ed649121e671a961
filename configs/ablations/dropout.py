"""How often the I2I prior trains without its condition, which decides how far it can be guided.

python -m lumos_jax.main --config=configs/ablations/dropout.py:VARIANT --config.data.path=DIR --workdir=RUN
    0.05, 0.1 (Lumos), 0.15, 0.2 or 0.3
python -m lumos_jax.sample --workdir=RUN --images ... --guidance=G    for G from 1 to 10
configs/ablations/dropout.py:desk,VARIANT   on scenes: five minutes on 2 CPU cores
configs/ablations/dropout.py:test,VARIANT   the same in seconds
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # config files are loaded by path, from anywhere

from configs import common, i2i

VARIANTS = (0.05, 0.1, 0.15, 0.2, 0.3)


def _set(probability):
    def change(config, size):
        config.task.condition_dropout = probability

    return change


def get_config(name=""):
    sizes = {"": i2i.paper, "desk": i2i.desk, "test": i2i.test}
    return common.vary(name, sizes, {str(probability): _set(probability) for probability in VARIANTS})
