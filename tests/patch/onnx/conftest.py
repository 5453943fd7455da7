from __future__ import annotations

from tests.formats.onnx.conftest import change as change
from tests.formats.onnx.conftest import write as write
