"""Compare results of inference: python test_tipc/check_results.py --tolerance 1e-4 REFERENCE.jsonl OTHER.jsonl

The files are those of `deploy/infer.py --save_json`. Every picture must be in both, with the same score within the
tolerance, and with the same label unless the first score is that close to the threshold; what differs is a line each,
and the exit code is then 1.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the repository's root

from deploy.common.cli import ArgumentParser, UserError, non_negative_float, run_main


def main() -> int:
    parser = ArgumentParser(description="Compare the results of two inferences.")
    parser.add_argument("reference", help="results as lines of JSON")
    parser.add_argument("other", help="results that must be the same")
    parser.add_argument("--tolerance", type=non_negative_float, required=True, help="of the scores")
    parser.add_argument("--normal", metavar="PICTURE", help="must be found normal in both")
    parser.add_argument("--anomaly", metavar="PICTURE", help="must be found anomalous in both")
    args = parser.parse_args()
    reference, other = read_results(args.reference), read_results(args.other)
    found = differences(reference, other, args.tolerance)
    for picture, label in ((args.normal, "Normal"), (args.anomaly, "Anomaly")):
        if picture:
            given = {results.get(str(Path(picture)), {}).get("label") for results in (reference, other)}
            found += [f"{picture}: {label} is right, not {wrong}" for wrong in given - {label}]
    for line in found:
        print(line)
    if found:
        return 1
    largest = max(abs(reference[path]["score"] - other[path]["score"]) for path in reference)
    print(f"{len(reference)} pictures agree: scores within {largest:.2g} (allowed: {args.tolerance:g})")
    return 0


def read_results(file: str) -> dict[str, dict[str, Any]]:
    """The results in a file, by the picture's path.

    Raises:
        UserError: it is missing, empty, or not such results.
    """
    try:
        results = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
        by_path = {str(Path(result["path"])): result for result in results}
        for result in results:
            if "error" not in result:
                result["score"], result["threshold"] = float(result["score"]), float(result["threshold"])
                result["label"] = str(result["label"])
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not results of deploy/infer.py --save_json ({error})") from error
    if not results:
        raise UserError(f"{file}: holds no results")
    return by_path


def differences(reference: dict[str, Any], other: dict[str, Any], tolerance: float) -> list[str]:
    """A line for each picture whose results are not the same."""
    found = []
    for path in sorted(reference.keys() | other.keys()):
        results = [reference.get(path), other.get(path)]
        if None in results:
            found.append(f"{path}: only in one of the two")
            continue
        errors = [result["error"] for result in results if "error" in result]
        if errors:
            found += errors
            continue
        (score, label), (other_score, other_label) = ((result["score"], result["label"]) for result in results)
        close = abs(score - results[0]["threshold"]) <= tolerance
        if (label != other_label and not close) or not abs(score - other_score) <= tolerance:
            found.append(f"{path}: {label} {score:.6f} is not {other_label} {other_score:.6f}")
    return found


if __name__ == "__main__":
    run_main(main)
