from __future__ import annotations

from tests.formats.gguf.conftest import write as write
