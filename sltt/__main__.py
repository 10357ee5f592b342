"""`python -m sltt` is `sltt`."""

import os
import sys

from sltt.commands import main

if sys.path[0] == os.getcwd():  # as `python -m` begins it; a run that is read takes no code from there
    del sys.path[0]
sys.exit(main())
