"""``python -m simpo.cli``, as launchers such as ``torchrun`` start the command ``simpo``."""

import sys

from simpo.cli import main

sys.exit(main())
