"""What the plugin costs and what pinning gains, measured: ``make bench``."""

import sys
from pathlib import Path

# The engines, the agents and the session server of the demo are measured here too.
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
