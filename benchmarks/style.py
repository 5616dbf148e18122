"""The style of the pictures: few lines, and colours that colour-blind people can tell apart."""

from typing import Any

INK, FAINT = "#1A1A1A", "#8A8A8A"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "text.parse_math": False,  # a trace's name may contain a $
    "svg.hashsalt": "benchmarks",
    **{f"axes.spines.{side}": False for side in ("left", "right", "top")},
    **{f"{axis}tick.color": INK for axis in "xy"},
}
