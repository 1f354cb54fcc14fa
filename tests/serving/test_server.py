"""The server answers what the offline functions answer, batches, and refuses what it should."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")

from fastapi.testclient import TestClient  # noqa: E402 - after the check that it is there

from recbole_llm.cli import main  # noqa: E402
from recbole_llm.serving.kept import Kept  # noqa: E402
from recbole_llm.serving.recommend import recommend  # noqa: E402
from recbole_llm.serving.score import score  # noqa: E402
from recbole_llm.serving.server import Batcher, Limits, create_app  # noqa: E402

TOKEN = "secret"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
PAIRS = [("4", "1"), ("2", "9"), ("4", "30"), ("1", "3")]


@pytest.fixture
def client(served):
    """``client(name, **limits)``: a client of a freshly loaded run."""
    opened = []

    def make(name: str, **limits) -> TestClient:
        app = create_app(served(name), token=TOKEN, limits=Limits(**limits))
        opened.append(TestClient(app, headers=HEADERS).__enter__())
        return opened[-1]

    yield make
    for one in opened:
        one.__exit__(None, None, None)


@pytest.mark.parametrize(
    "name", ["RecLoRA", "RecLoRA user", "TALLRec", "RecLoRA stream", "iLoRA", "SASRec", "Stream", "BPR"]
)
def test_answers_equal_the_offline_ones(name, client, served):
    http, run = client(name), served(name)
    answer = http.post("/score", json={"pairs": [{"user": u, "item": i} for u, i in PAIRS]}).json()
    expected = score(run, pd.DataFrame(PAIRS, columns=["user", "item"]))
    assert [(s["user"], s["item"]) for s in answer["scores"]] == PAIRS and answer["scale"] == run.scale
    np.testing.assert_allclose([s["score"] for s in answer["scores"]], expected["score"], atol=1e-6)
    body = {"users": ["4", "2", "nobody"], "top": 4}
    for _ in range(2):  # the second time from what was kept
        answer = http.post("/recommend", json=body).json()
        assert answer["unknown_users"] == ["nobody"]
        for user, part in recommend(run, ["4", "2"], top=4).groupby("user"):
            found = answer["users"][user]
            assert [row["item"] for row in found] == part["item"].tolist()
            assert [row["stage"] for row in found] == part["stage"].tolist()
            np.testing.assert_allclose([row["score"] for row in found], part["score"], atol=1e-6)


def test_interactions_change_what_follows_and_new_users_are_answered(client, served):
    http, run = client("RecLoRA"), served("RecLoRA")
    later = [
        {"user_id": "4", "item_id": "7", "rating": 5, "timestamp": 990_000_000},
        {"user_id": "new", "item_id": "8", "rating": 2, "timestamp": 990_000_000},
    ]
    before = http.post("/recommend", json={"users": ["4"]}).json()
    assert http.post("/interactions", json={"interactions": later}).json()["new_users"] == 1
    run.append(pd.DataFrame(later))
    after = http.post("/recommend", json={"users": ["4", "new"]}).json()
    assert after["users"]["4"] != before["users"]["4"]
    expected = recommend(run, ["4", "new"])
    for user, part in expected.groupby("user"):
        assert [row["item"] for row in after["users"][user]] == part["item"].tolist()
    assert http.post("/interactions", json={"interactions": [{"user_id": "4"}]}).status_code == 422


def test_a_new_item_comes_with_its_title(client):
    http = client("TALLRec stream")
    later = [{"user_id": "2", "item_id": "900", "rating": 5, "timestamp": 990_000_000}]
    titles = [{"item_id": "900", "movie_title": "Silver Harbour", "release_year": 1999, "class": "Drama"}]
    assert http.post("/interactions", json={"interactions": later}).status_code == 422  # it has no title
    assert http.post("/interactions", json={"interactions": later, "items": titles}).json()["new_items"] == 1
    body = {"users": ["4"], "candidates": ["900", "1"], "exclude_seen": False}
    found = http.post("/recommend", json=body).json()["users"]["4"]
    assert {row["title"] for row in found} >= {"Silver Harbour (1999)"}


def test_requests_that_wait_are_scored_in_one_call(served):
    run = served("RecLoRA")
    users, items = (
        run.ids(f, v).known for f, v in zip(("user_id", "item_id"), zip(*PAIRS, strict=True), strict=True)
    )
    alone = [run.score(users[i : i + 1], items[i : i + 1])[0] for i in range(4)]
    sizes: list[int] = []

    async def together() -> list[np.ndarray]:
        batcher = Batcher(run, Limits(batch=3), sizes.append)
        first = asyncio.create_task(batcher.score(users[:1], items[:1]))
        await asyncio.sleep(0)  # it has begun; the others wait
        rest = [asyncio.create_task(batcher.score(users[i : i + 1], items[i : i + 1])) for i in range(1, 4)]
        found = await asyncio.gather(first, *rest)
        await batcher.close()
        return found

    found = np.concatenate(asyncio.run(together()))
    np.testing.assert_allclose(found, alone, atol=1e-6)
    assert sizes == [1, 3]


def test_a_client_that_goes_away_does_not_stop_the_others(served):
    run = served("DIN")
    users, items = run.ids("user_id", ["4", "2"]).known, run.ids("item_id", ["1", "9"]).known

    async def scenario() -> np.ndarray:
        batcher = Batcher(run, Limits(), lambda _: None)
        first = asyncio.create_task(batcher.score(users[:1], items[:1]))
        await asyncio.sleep(0)
        gone, stays = (asyncio.create_task(batcher.score(users[1:], items[1:])) for _ in range(2))
        await asyncio.sleep(0)
        gone.cancel()
        found = await stays
        await first
        await batcher.close()
        return found

    np.testing.assert_allclose(asyncio.run(scenario()), run.score(users[1:], items[1:]), atol=1e-6)


def test_limits_and_malformed_requests(client):
    http = client("DIN", body=2000, pairs=3, users=2, candidates=2, top=5, id_length=10)
    pair = {"user": "4", "item": "1"}
    assert http.post("/score", json={"pairs": [pair] * 3}).status_code == 200
    assert http.post("/score", json={"pairs": [pair] * 4}).status_code == 422
    assert http.post("/score", json={"pairs": []}).status_code == 422
    assert http.post("/score", json={"pairs": [{"user": "4"}]}).status_code == 422
    assert http.post("/score", json={"pairs": [{"user": "4" * 11, "item": "1"}]}).status_code == 422
    assert http.post("/score", json={"pairs": [pair], "more": 1}).status_code == 422
    assert http.post("/score", content=b"{nonsense").status_code == 422
    assert http.post("/score", content=b" " * 2001).status_code == 413
    assert http.post("/score", content=iter([b" " * 1500] * 2)).status_code == 413  # no length is declared
    assert http.post("/recommend", json={"users": ["1", "2", "3"]}).status_code == 422
    assert http.post("/recommend", json={"users": ["1"], "top": 6}).status_code == 422
    assert http.post("/recommend", json={"users": ["1"], "candidates": ["1", "2", "3"]}).status_code == 422
    assert http.get("/score").status_code == 405 and http.get("/nothing").status_code == 404


def test_a_token_is_needed_and_health_is_open(client):
    http = client("DIN")
    pair = {"pairs": [{"user": "4", "item": "1"}]}
    for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": ""}):
        assert http.post("/score", json=pair, headers=headers).status_code == 401
        assert http.get("/metrics", headers=headers).status_code == 401
    health = http.get("/health", headers={"Authorization": ""}).json()
    assert health["status"] == "ok" and health["model"] == "DIN" and health["items"] == 50


def test_metrics_and_the_description_of_the_interface(client):
    http = client("DIN")
    http.post("/score", json={"pairs": [{"user": "4", "item": "1"}]})
    http.post("/recommend", json={"users": ["4"]})
    http.post("/recommend", json={"users": ["4"]})
    text = http.get("/metrics").text
    assert 'recbole_llm_requests_total{path="/score",status="200"} 1.0' in text
    assert 'recbole_llm_kept_total{found="yes"} 1.0' in text
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/score", "/recommend", "/interactions", "/health", "/metrics"} <= paths.keys()
    page = http.get("/docs").text  # nothing in it comes from another host
    assert all(f" {path}</code>" in page for path in paths) and "//" not in page.replace("http://test", "")


def test_the_queue_is_bounded(served):
    run = served("DIN")
    user, item = run.ids("user_id", ["4"]).known, run.ids("item_id", ["1"]).known

    async def scenario() -> list:
        batcher = Batcher(run, Limits(queue=2), lambda _: None)
        tasks = [asyncio.create_task(batcher.score(user, item)) for _ in range(4)]
        found = await asyncio.gather(*tasks, return_exceptions=True)
        await batcher.close()
        return found

    found = asyncio.run(scenario())
    refused = [one for one in found if isinstance(one, Exception)]
    assert len(refused) == 2 and all(one.status_code == 503 for one in refused)


def test_what_is_kept_is_bounded():
    kept = Kept(2)
    for user in "abc":
        kept.put((user, 1), user)
        kept.get(("a", 1))
    assert len(kept) == 2 and kept.get(("b", 1)) is None and kept.get(("a", 1)) == "a"
    kept.forget([("a", 1), ("b", 1)])
    assert kept.get(("a", 1)) is None and len(kept) == 1


@pytest.fixture
def process(finished, tmp_cwd):
    """A server of its own process on a free port: the process and its address."""
    code = "import sys; from recbole_llm.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", code, "serve", str(finished("TALLRec")), "--port=0"]
    server = subprocess.Popen(
        [*arguments, "--no_token", "--device=cpu"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    line = server.stdout.readline()
    assert "http://127.0.0.1:" in line, server.stderr.read()
    address = line.split(" on ")[1].split()[0]
    for _ in range(200):
        try:
            httpx.get(f"{address}/health")
            break
        except httpx.ConnectError:
            time.sleep(0.1)
    yield server, address
    if server.poll() is None:
        server.kill()
    server.wait()


def test_sigterm_under_load_loses_nothing_that_was_accepted(process):
    server, address = process
    answers: list[int | str] = []
    body = {"pairs": [{"user": str(1 + i % 40), "item": str(1 + i % 50)} for i in range(300)]}

    def ask() -> None:
        try:
            answers.append(httpx.post(f"{address}/score", json=body, timeout=300).status_code)
        except httpx.TransportError as error:
            answers.append(repr(error))

    def accepted() -> float:
        text = httpx.get(f"{address}/metrics", timeout=60).text
        names = ("recbole_llm_in_progress{", "recbole_llm_requests_total{")
        lines = [line for line in text.splitlines() if line.startswith(names) and 'path="/score"' in line]
        return sum(float(line.split()[-1]) for line in lines)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    while accepted() < 6:
        time.sleep(0.05)
    server.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert answers == [200] * 6
    assert server.wait(timeout=60) in (0, -signal.SIGTERM)


def test_two_servers_on_one_port(finished, tmp_cwd, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", str(finished("DIN")), f"--port={port}", "--no_token", "--device=cpu"]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_without_the_extra_the_command_names_it(finished, tmp_cwd, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "recbole_llm.serving.server", raising=False)
    monkeypatch.delattr("recbole_llm.serving.server", raising=False)
    assert main(["serve", str(finished("DIN")), "--port=0"]) == 2
    assert "pip install 'recbole_llm[serve]'" in capsys.readouterr().err
    assert os.getcwd() == str(tmp_cwd)
