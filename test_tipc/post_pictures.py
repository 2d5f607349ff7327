"""Ask the service about pictures: python test_tipc/post_pictures.py http://127.0.0.1:8866 RESULTS.jsonl ANSWERS.jsonl

Waits until the service is ready, posts every picture that RESULTS names, as deploy/infer.py --save_json wrote it, and
writes the answers in the same form. The service must have one model.
"""

import base64
import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the repository's root

from deploy.common.cli import ArgumentParser, UserError, run_main
from deploy.common.files import write_text

READY_SECONDS = 120
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would not reach this machine's service


def main() -> None:
    parser = ArgumentParser(description="Post pictures to the service.")
    parser.add_argument("url", help="of the service")
    parser.add_argument("results", help="lines of JSON whose path is a picture")
    parser.add_argument("answers", help="written")
    args = parser.parse_args()
    try:
        paths = [json.loads(line)["path"] for line in Path(args.results).read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"{args.results}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{args.results}: not results of deploy/infer.py --save_json ({error})") from error
    url = args.url.rstrip("/")
    wait_until_ready(url)
    name = ask(f"{url}/v1/models")["models"][0]["name"]
    lines = []
    for path in paths:
        picture = base64.b64encode(Path(path).read_bytes()).decode()
        answer = ask(f"{url}/v1/models/{name}:predict", {"image": picture})
        print(f"{path}  {answer['label']} - score:  {answer['score']:.3f}")
        result = {"path": path, "score": answer["score"], "label": answer["label"]}
        lines.append(json.dumps({**result, "threshold": answer["image_threshold"]}, ensure_ascii=False))
    write_text(Path(args.answers), "".join(line + "\n" for line in lines))


def wait_until_ready(url: str) -> None:
    """Return once the service takes pictures.

    Raises:
        UserError: it does not within `READY_SECONDS`.
    """
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            return ask(f"{url}/health/ready")
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def ask(address: str, content: dict[str, str] | None = None) -> dict[str, Any]:
    """The service's JSON answer to a GET, or with content to a POST of it.

    Raises:
        UserError: no service there, or it answers with an error.
    """
    body = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        with DIRECT.open(request, timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise UserError(f"{address}: {error} {error.read().decode(errors='replace')}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{address}: {error}") from error


if __name__ == "__main__":
    run_main(main)
