"""Marks of tests that need an optional package."""

from __future__ import annotations

import pytest

from exporter.packages import LLAMA_CPP

needs_llama_cpp = pytest.mark.skipif(
    not LLAMA_CPP.is_installed(), reason="llama-cpp-python is not installed (extra: llamacpp)"
)
