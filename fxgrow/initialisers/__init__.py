"""Ways to initialise new units, one file each; importing this package enters them into the table."""

from fxgrow.initialisers import default, firefly, gradmax, net2wider, north, random, splitting, tiny, variance_transfer
from fxgrow.initialisers.registry import Initialiser, Proposal, Written, find_initialiser, initialiser, writer

__all__ = ["Initialiser", "Proposal", "Written", "find_initialiser", "initialiser", "writer"]
__all__ += ["default", "firefly", "gradmax", "net2wider", "north", "random", "splitting", "tiny", "variance_transfer"]
