"""`python -m qwenvit` is the `qwenvit` command."""

import sys

from qwenvit.cli import main

sys.exit(main())
