"""A bounded load test of ``recbole-llm serve``: concurrent requests against one request at a time.

    python benchmarks/serving_load.py http://127.0.0.1:8000 --token TOKEN --seconds 20 --clients 8

Asks ``/score`` with one pair per request, users and items drawn from a seed, first by one client that waits for each
answer, then by several clients at once. Prints requests per second and the median and 99th percentile of the time to
answer. Only addresses of this machine are asked.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from urllib.parse import urlparse

import httpx
import numpy as np


def load(
    address: str, token: str | None, clients: int, seconds: float, users: int, items: int
) -> dict[str, float]:
    """Ask for ``seconds`` with ``clients`` threads, each with one request under way."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    times: list[float] = []
    failed: list[str] = []
    end = time.monotonic() + seconds

    def ask(seed: int) -> None:
        draw = random.Random(seed)
        with httpx.Client(base_url=address, headers=headers, timeout=60) as http:
            while time.monotonic() < end:
                pair = {"user": str(draw.randint(1, users)), "item": str(draw.randint(1, items))}
                started = time.monotonic()
                answer = http.post("/score", json={"pairs": [pair]})
                (times if answer.status_code == 200 else failed).append(
                    time.monotonic() - started if answer.status_code == 200 else str(answer.status_code)
                )

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(clients)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - started
    p50, p99 = np.percentile(times, [50, 99]) if times else (float("nan"),) * 2
    return {
        "requests": len(times),
        "failed": len(failed),
        "per_second": len(times) / took,
        "p50": p50,
        "p99": p99,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("address", help="e.g. http://127.0.0.1:8000")
    parser.add_argument("--token")
    parser.add_argument("--seconds", type=float, default=20, help="of each of the two parts, at most 300")
    parser.add_argument("--clients", type=int, default=8, help="at most 64")
    parser.add_argument("--users", type=int, default=943, help="ids are drawn from 1 to this number")
    parser.add_argument("--items", type=int, default=1682)
    args = parser.parse_args()
    if urlparse(args.address).hostname not in ("127.0.0.1", "localhost", "::1"):
        parser.error("only servers on this machine are asked")
    if not (0 < args.seconds <= 300 and 1 <= args.clients <= 64):
        parser.error("--seconds must be at most 300 and --clients at most 64")
    for clients in (1, args.clients):
        found = load(args.address, args.token, clients, args.seconds, args.users, args.items)
        print(
            f"{clients} at a time: {found['requests']} requests, {found['failed']} failed, "
            f"{found['per_second']:.1f} requests/s, p50 {1000 * found['p50']:.0f} ms, p99 {1000 * found['p99']:.0f} ms"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
