"""`python -m pipeline` is the same command as `voxfit`."""

import sys

from pipeline.cli import main

sys.exit(main())
