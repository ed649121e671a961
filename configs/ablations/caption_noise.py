"""How much captions that belong to other images hurt text-to-image training (Fig. 2a).

python -m lumos_jax.main --config=configs/ablations/caption_noise.py:VARIANT --config.data.path=DIR --workdir=RUN
    0.1 to 0.9: the share of training records with another record's caption
configs/ablations/caption_noise.py:desk,VARIANT   on scenes: about ten minutes on 2 CPU cores
configs/ablations/caption_noise.py:test,VARIANT   the same in seconds
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # config files are loaded by path, from anywhere

from configs import common, t2i

VARIANTS = tuple(tenths / 10 for tenths in range(1, 10))


def _set(share):
    def change(config, size):
        config.data.captions.noise = share

    return change


def get_config(name=""):
    sizes = {"": t2i.paper, "desk": t2i.desk, "test": t2i.test}
    return common.vary(name, sizes, {str(share): _set(share) for share in VARIANTS})
