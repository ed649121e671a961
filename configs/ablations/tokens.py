"""Which of the encoder's tokens the I2I prior is conditioned on.

python -m lumos_jax.main --config=configs/ablations/tokens.py:VARIANT --config.data.path=DIR --workdir=RUN
    cls     the global token, which Lumos conditions on
    patch   a token a patch
    all     both
configs/ablations/tokens.py:desk,VARIANT   on scenes, with the shipped self-supervised ViT: five minutes on 2 CPU cores
configs/ablations/tokens.py:test,VARIANT   the same in seconds
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # config files are loaded by path, from anywhere

from configs import common, i2i

VARIANTS = ("cls", "patch", "all")


def _set(output):
    def change(config, size):
        if size:
            common.shipped_encoder(config)
        config.encoder.output = output

    return change


def get_config(name=""):
    sizes = {"": i2i.paper, "desk": i2i.desk, "test": i2i.test}
    return common.vary(name, sizes, {output: _set(output) for output in VARIANTS})
