"""`python -m sltt` is `sltt`."""

import sys

from sltt.commands import main

sys.exit(main())
