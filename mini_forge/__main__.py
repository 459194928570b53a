"""`python -m mini_forge`."""

import sys

from mini_forge.cli import main

sys.exit(main())
