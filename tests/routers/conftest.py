"""Skip the tests that are specific to a gateway which is not installed."""

from .launch import PACKAGE

_PECULIAR = {"sglang-router": "test_sglang_router.py", "vllm-router": "test_vllm_router.py"}

collect_ignore = [file for package, file in _PECULIAR.items() if package != PACKAGE]
