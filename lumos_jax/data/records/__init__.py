"""Sample types: what one record gives to a batch. Every file here registers in `base.SAMPLE_TYPES` under the value of
config.data.sample_type that names it; `cached` reads what `prepare cache` made of the others. A new one is a file here."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from lumos_jax.data.base import Data, Source, chosen
from lumos_jax.data.records.base import SAMPLE_TYPES, Loader, Row
from lumos_jax.data.records.cached import CachedCaptions, CachedLoader

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def make_loader(data: Data, source: Source, *, training: bool, **use: Any) -> Loader:
    """What makes batches of the records of a source, as config.data.sample_type says; for the arguments see `Loader`.
    Raises ValueError: the source has no such records."""
    kind = chosen(SAMPLE_TYPES, "sample_type", data.sample_type)
    if data.source == "cached":
        kind = CachedCaptions if data.sample_type == "captioned" else CachedLoader
    loader = kind(data, source, training, **use)
    loader.check()
    return loader


def describe_row(data: Data) -> Row:
    """What batches of config.data hold, decoded from records of any source; none is opened, and caches are passed by."""
    return SAMPLE_TYPES[data.sample_type](data, None, training=True).row()
