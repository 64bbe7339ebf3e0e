"""The operations: one file, one pass, named for what it does. `surgery/recipe.py` says in which order they run."""

import surgery  # noqa: F401  (first, whichever of the two packages is imported first: surgery's recipe imports the passes)
