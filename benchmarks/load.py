"""Many clients at once on a running service: python -m benchmarks.load --url http://127.0.0.1:8866 --model bottle

Prints requests, errors, latencies and how much memory the service has gained; the exit code is 1 if there were errors.
"""

import argparse
import http.client
import re
import threading
import time
from pathlib import Path
from urllib.parse import quote, urlsplit

import numpy as np

from deploy.common.cli import ArgumentParser, UserError, non_negative_int, positive_int, run_main
from deploy.common.imaging import list_images


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m benchmarks.load", description="Many clients at once on a running service.")
    parser.add_argument("--url", default="http://127.0.0.1:8866", help="of the service (%(default)s)")
    parser.add_argument("--model", default="bottle", help="name of the model (%(default)s)")
    parser.add_argument("--image_path", default="./lite_data/bottle/test/*/*.png", help="sent in turns (%(default)s)")
    parser.add_argument("--clients", type=positive_int, default=16, help="at once (%(default)s)")
    parser.add_argument("--warmup", type=non_negative_int, default=5, help="seconds that do not count (%(default)s)")
    parser.add_argument("--seconds", type=positive_int, default=60, help="seconds that count (%(default)s)")
    return parser.parse_args()


class Client(threading.Thread):
    """One client: a connection that is kept, and one request after the other."""

    def __init__(self, host: str, path: str, bodies: list[bytes], until: float) -> None:
        super().__init__()
        self.answers: list[tuple[float, float, int]] = []  # when it was sent, seconds it took, status (0: none)
        self._host, self._path, self._bodies, self._until = host, path, bodies, until

    def run(self) -> None:
        connection = http.client.HTTPConnection(self._host, timeout=60)
        headers = {"Content-Type": "multipart/form-data; boundary=limit"}
        while (begun := time.monotonic()) < self._until:
            try:
                connection.request("POST", self._path, self._bodies[len(self.answers) % len(self._bodies)], headers)
                answer = connection.getresponse()
                answer.read()
                status = answer.status
            except (OSError, http.client.HTTPException):
                connection.close()
                status = 0
            self.answers.append((begun, time.monotonic() - begun, status))


def form(file: Path) -> bytes:
    """A multipart form with the picture."""
    head = f'--limit\r\nContent-Disposition: form-data; name="image"; filename="{file.name}"\r\n\r\n'
    return head.encode() + file.read_bytes() + b"\r\n--limit--\r\n"


def memory(host: str) -> float:
    """Megabytes that the service's process holds.

    Raises:
        UserError: no service there.
    """
    try:
        connection = http.client.HTTPConnection(host, timeout=60)
        connection.request("GET", "/metrics")
        figures = connection.getresponse().read().decode()
        return float(re.search(r"^process_resident_memory_bytes (\S+)", figures, re.M)[1]) / 2**20
    except (OSError, http.client.HTTPException, TypeError) as error:
        raise UserError(f"--url {host}: no service answers there; start deploy/serve.py ({error})") from error


def main() -> int:
    args = parse_args()
    host = urlsplit(args.url).netloc or args.url
    bodies = [form(file) for file in list_images(args.image_path)]
    memory(host)  # before anything is started: is it there?
    start = time.monotonic() + args.warmup
    path = f"/v1/models/{quote(args.model)}:predict"
    # Each client begins with another picture.
    clients = [
        Client(host, path, bodies[i % len(bodies) :] + bodies[: i % len(bodies)], start + args.seconds)
        for i in range(args.clients)
    ]
    for client in clients:
        client.start()
    time.sleep(args.warmup)
    held = [memory(host)]
    while any(client.is_alive() for client in clients):
        time.sleep(1)
        held.append(memory(host))
    answers = [answer for client in clients for answer in client.answers if answer[0] >= start]
    seconds = np.array([seconds for _, seconds, _ in answers])
    errors = [status for _, _, status in answers if status != 200]
    p50, p95 = np.percentile(seconds, [50, 95])
    print(f"clients: {args.clients}, seconds: {args.seconds}, requests: {len(answers)}, errors: {len(errors)}")
    if errors:
        print(f"statuses of the errors (0: no answer): {sorted(set(errors))}")
    print(f"images/sec: {len(answers) / args.seconds:.1f}, p50(ms): {1e3 * p50:.1f}, p95(ms): {1e3 * p95:.1f}")
    print(f"cpu_memory(MB): {held[0]:.1f} at the start, {held[-1]:.1f} at the end, {max(held):.1f} at most")
    return 1 if errors else 0


if __name__ == "__main__":
    run_main(main)
