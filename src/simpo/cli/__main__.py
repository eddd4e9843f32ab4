"""``python -m simpo.cli``, for launchers such as ``torchrun -m``."""

import sys

from simpo.cli import main

sys.exit(main())
