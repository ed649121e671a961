"""What text-to-image training starts from: the paper's comparison of priors.

python -m lumos_jax.main --config=configs/ablations/t2i_prior.py:VARIANT --config.data.path=DIR --workdir=RUN
    scratch             nothing
    i2i                 runs/i2i, of configs/i2i.py: the prior without text
    class_conditional   runs/class_conditional, of configs/ablations/class_conditional.py (or of DiT's release)
    unconditional       runs/unconditional, of configs/ablations/unconditional.py
    rcg                 runs/rcg, of configs/ablations/rcg.py (or of RCG's release)
    pixart              PixArt-XL-2-256x256.pth, PixArt-alpha's release: a prior that was trained on captions
configs/ablations/t2i_prior.py:desk,VARIANT   on scenes, from runs of the :desk sizes: about ten minutes on 2 CPU cores.
    PixArt-alpha has one size, so that pixart stands for a prior of captions here: runs/scratch, of :desk,scratch
configs/ablations/t2i_prior.py:test,VARIANT   the same in seconds

--config.init_from says where a prior is, if elsewhere. Those without cross-attention keep their own final layer.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # config files are loaded by path, from anywhere

from configs import common, t2i

ADALN = ("class_conditional", "unconditional", "rcg")
VARIANTS = ("scratch", "i2i", *ADALN, "pixart")


def _set(prior):
    def change(config, size):
        if prior == "pixart":
            config.init_from = "runs/scratch" if size else "PixArt-XL-2-256x256.pth"
        elif prior != "scratch":
            config.init_from = f"runs/{prior}"
        if prior in ADALN:
            config.model.final = "adaln"
        if prior == "rcg" and not size:
            config.model.activation = "gelu"

    return change


def get_config(name=""):
    sizes = {"": t2i.paper, "desk": t2i.desk, "test": t2i.test}
    return common.vary(name, sizes, {prior: _set(prior) for prior in VARIANTS})
