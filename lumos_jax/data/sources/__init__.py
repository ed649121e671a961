"""Sources of records, one file each: every file here registers what it defines in `base.SOURCES` under the value of
config.data.source that names it. A new source is a file in this folder."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
