"""``python -m preconditioner_service``."""

import sys

from preconditioner_service.cli import main

sys.exit(main())
