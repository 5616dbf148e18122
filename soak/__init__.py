"""Many sessions through a session server while everything around it fails: ``make soak``."""

import sys
from pathlib import Path

# The soak ends in order after a signal, as the demo does.
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
