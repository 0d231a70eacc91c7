"""Ways to initialise new units, one file each; a line here enters the methods of a file into the table."""

from fxgrow.initialisers import default as default
from fxgrow.initialisers import firefly as firefly
from fxgrow.initialisers import gradmax as gradmax
from fxgrow.initialisers import net2wider as net2wider
from fxgrow.initialisers import north as north
from fxgrow.initialisers import random as random
from fxgrow.initialisers import splitting as splitting
from fxgrow.initialisers import tiny as tiny
from fxgrow.initialisers import variance_transfer as variance_transfer
