"""Small collections in the forms in which they are downloaded, for tests of preparation."""

import io
import tarfile

import numpy as np
from PIL import Image

from lumos_jax.scenes import render, scene


def photo(number, size=(160, 200), kind="JPEG", **how):
    """The file of an image of a scene; a different one for each number."""
    out = io.BytesIO()
    Image.fromarray(render.render(scene.make_scene(number), size)).save(out, kind, **how)
    return out.getvalue()


def solid(level=90, size=(160, 200)):
    out = io.BytesIO()
    Image.fromarray(np.full((*size, 3), level, np.uint8)).save(out, "JPEG")
    return out.getvalue()


def tar(files, format=tarfile.USTAR_FORMAT, mode="w"):
    """The bytes of a .tar of (name, content) each, in that order."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=format) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()
