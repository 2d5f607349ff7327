"""A contender's process: python -m benchmarks.worker KIND [ARGUMENT ...].

Commands are JSON lines on stdin, `{"call": METHOD, "arguments": {...}}`; the answers are JSON lines on what was stdout
at the start, `{"result": ...}` or `{"error": TEXT}`, the first of them `describe()` of the new contender. What
libraries print goes to stderr.
"""

import json
import os
import sys
import warnings
from typing import Any

from deploy.common import runtime


def make(kind: str, arguments: list[str]) -> Any:
    """The contender, after what must happen before its framework is imported."""
    if kind == "ours":
        chosen = runtime.import_paddle()
        from benchmarks.contenders.ours import Ours

        return Ours(chosen, *arguments)
    if kind == "published":
        from benchmarks.contenders.published import Published

        return Published()
    if kind == "exported":
        folder, backend, precision, winograd, threads = arguments
        from deploy.backends import prepare_runtime

        chosen_threads = prepare_runtime(backend, int(threads))
        from benchmarks.contenders.exported import Exported

        return Exported(folder, backend, precision, winograd == "True", chosen_threads)
    from benchmarks import torchvision_operators  # noqa: F401

    if kind == "anomalib_openvino":
        from benchmarks.contenders.anomalib_openvino import AnomalibOpenvino

        return AnomalibOpenvino(*arguments)
    if kind == "anomalib_model":
        from benchmarks.contenders.anomalib_model import AnomalibModel

        return AnomalibModel()
    from benchmarks.contenders.anomalib import Anomalib

    return Anomalib(*arguments)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")  # of the frameworks, about themselves

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        contender = make(sys.argv[1], sys.argv[2:])
        answer({"result": contender.describe()})
        for line in sys.stdin:
            command = json.loads(line)
            answer({"result": getattr(contender, command["call"])(**command["arguments"])})
    except Exception as error:  # the parent reports it, whatever it is
        answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
