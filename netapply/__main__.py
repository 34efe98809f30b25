"""`python -m netapply` is the command."""

import sys

from netapply.cli import main

sys.exit(main())
