"""`python -m trl_cmdp`, the same as `trl-cmdp`."""

import sys

from .cli import main


sys.exit(main())
