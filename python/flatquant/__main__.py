"""``python -m flatquant`` is the console script ``flatquant``."""

import sys

from flatquant.cli import main

sys.exit(main())
