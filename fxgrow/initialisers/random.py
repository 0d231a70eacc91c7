"""Random units: incoming weights alpha `[k, P]` Kaiming-normal; outgoing weights zero (the usual baseline) or refitted.

He, Zhang, Ren, Sun: "Delving Deep into Rectifiers", ICCV 2015, arXiv 1502.01852, eq. 10. `random` changes nothing at
first; `random-refit` separates what the directions of the default bring from what the refit brings.
"""

from fxgrow.initialisers.registry import Initialiser, initialiser

# without a proposal the rewrite draws the rows
initialiser("random", moments=False)(Initialiser)
initialiser("random-refit", moments=False, refit=True)(Initialiser)
