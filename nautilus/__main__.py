"""`python -m nautilus` is the command `nautilus`."""

import sys

from nautilus.cli import main

sys.exit(main())
