"""``python -m simpo``, the same as the command ``simpo``."""

import sys

from simpo.cli import main

sys.exit(main())
