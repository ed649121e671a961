"""From folders and shards to a training run: plan, scan, select, write, verify, report, and two steps on the result."""

import hashlib
import io
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import prepare_corpus, prepare_quality
from configs import i2i
from lumos_jax.config import io as config_io
from lumos_jax.data.manifest import read_manifest
from lumos_jax.train import loop
from tests.running import finish, on_one_device, start

COUNT = 160
