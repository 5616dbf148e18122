"""How the pictures look: few lines, and colours that colour-blind eyes tell apart."""

from typing import Any

INK, FAINT = "#1A1A1A", "#8A8A8A"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "text.parse_math": False,  # a trace may be called $x
    "svg.hashsalt": "benchmarks",
    **{f"axes.spines.{side}": False for side in ("left", "right", "top")},
    **{f"{axis}tick.color": INK for axis in "xy"},
}
