"""Ways to initialise new units, one file each; importing this package enters them into the table."""

from fxgrow.initialisers import default, random, tiny
from fxgrow.initialisers.registry import Initialiser, Proposal, find_initialiser, initialiser

__all__ = ["Initialiser", "Proposal", "default", "find_initialiser", "initialiser", "random", "tiny"]
