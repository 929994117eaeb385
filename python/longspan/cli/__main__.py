"""``python -m longspan.cli``, where the ``longspan`` script is not on the PATH."""

import sys

from longspan.cli import main

sys.exit(main())
