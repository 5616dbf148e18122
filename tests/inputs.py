"""Inputs for the laws, with awkward texts."""

import string

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# Every run has the same inputs, even on a busy machine, and keeps nothing on disk.
LAW = settings(
    max_examples=300,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


# The long ones exceed every limit of a header. Longer ones would take most of a test's time.
ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=())) | st.sampled_from(
    [
        "x" * 100_000,
        "é" * 50_000,
        "b'bytes'",
        "\\x00\\xff",
        "a\r\nX-SMG-Target-Worker: 0",
        "X-SMG-Routing-Key: s-1",
        "\0",
        "\ud800\udc00",
        "\U00010000",
        "\ufeffs",
        "s\u0301",
        "ś",
    ]
)
VISIBLE = st.text(string.ascii_letters + string.digits + string.punctuation)
