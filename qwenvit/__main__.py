"""Run the `qwenvit` command with `python -m qwenvit`."""

import sys

from qwenvit.cli.parser import main

sys.exit(main())
