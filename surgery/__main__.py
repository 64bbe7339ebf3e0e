"""`python -m surgery`: the command line."""

import sys

from surgery.cli import main

sys.exit(main())
