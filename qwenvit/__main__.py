"""`python -m qwenvit` is the `qwenvit` command."""

import sys

from qwenvit.cli.parser import main

sys.exit(main())
