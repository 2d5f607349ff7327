"""Whether models can be converted to ONNX here; the tests that do so are skipped otherwise, and say so."""

from importlib.util import find_spec

import paddle
import pytest

# Paddle2ONNX wants Paddle 3.
CONVERTER = not paddle.__version__.startswith("2.") and all(find_spec(name) for name in ("paddle2onnx", "onnx"))
INSTALL = "pip install -r requirements-deploy.txt, with Paddle 3"


def needs_converter(*runtimes: str) -> pytest.MarkDecorator:
    """Skip the test without Paddle2ONNX, or without one of these runtimes."""
    there = CONVERTER and all(find_spec(name) for name in runtimes)
    return pytest.mark.skipif(not there, reason=f"{', '.join((*runtimes, 'paddle2onnx and onnx'))}: {INSTALL}")
