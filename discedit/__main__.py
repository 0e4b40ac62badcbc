"""`python -m discedit`."""

import sys

from discedit.cli import main

sys.exit(main())
