"""Prepare a data set from images of the web.

python -m lumos_jax.prepare all --config=configs/prepare/web.py --out=DIR
    Scenes rendered here in place of downloads, within a minute: to see every command and the report.
python -m lumos_jax.prepare all --config=configs/prepare/web.py --source=folder:/data/photos --out=DIR
    A collection of your own.
configs/prepare/web.py:lumos   the paper's five collections, 190 million images, below one directory:
    --config=configs/prepare/web.py:lumos,/data
"""

from ml_collections import ConfigDict

from lumos_jax.preparation import settings


def embedded():
    return ConfigDict(settings.to_dict(settings.Prepare()))


def lumos(root):
    """`root`: a directory or URL with a folder for each collection, as its own tools download it."""
    config = embedded()
    config.sources = (
        {"kind": "imagenet", "path": f"{root}/imagenet", "priority": 3},
        {"kind": "sa1b", "path": f"{root}/sa1b", "priority": 2},
        {"kind": "journeydb", "path": f"{root}/journeydb", "metadata": f"{root}/journeydb/*.jsonl", "priority": 1},
        {"kind": "img2dataset", "name": "laion", "path": f"{root}/laion", "metadata": f"{root}/laion_metadata"},
        {"kind": "img2dataset", "name": "coyo", "path": f"{root}/coyo", "metadata": f"{root}/coyo_metadata"},
    )
    return config


def get_config(size=""):
    name, _, root = size.partition(",")
    if (name, bool(root)) not in (("", False), ("lumos", True)):
        raise ValueError(f"there is no {size!r}; after the file's name write nothing, or :lumos,DIRECTORY")
    return lumos(root) if root else embedded()
