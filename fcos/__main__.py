"""``python -m fcos`` and ``torchrun ... -m fcos``."""

import sys

from .cli import main

sys.exit(main())
