"""Ways to initialise new units, one file each: importing this package enters them all into the table of methods."""

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
