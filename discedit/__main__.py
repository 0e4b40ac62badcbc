"""`python -m discedit`."""

import sys

from discedit.cli.main import main

sys.exit(main())
