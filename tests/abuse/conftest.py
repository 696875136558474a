"""The modules beside the tests are imported by name, as the commands import them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
