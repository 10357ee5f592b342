"""`python -m sltt` is `sltt`."""

import sys

from sltt.cli import main

sys.exit(main())
