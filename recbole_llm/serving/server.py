"""A finished run behind HTTP: scores and recommendations, batched across users; needs the extra ``serve``.

One thread owns the model. Requests wait in a queue; those that are there when the thread becomes free are scored
together, each pair with its own gate, in one call of the model (:class:`Batcher`). What a request was accepted for is
finished before the server stops.
"""

# No postponed annotations here: FastAPI reads those of functions inside create_app.

import asyncio
import contextlib
import hmac
import json
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader

from recbole_llm.serving.kept import Kept
from recbole_llm.serving.recommend import choose, ranked
from recbole_llm.serving.run import ServedRun

Waiting = tuple[np.ndarray, np.ndarray, asyncio.Future]

try:
    import uvicorn
    from fastapi import Depends, FastAPI, HTTPException, Request, Response
    from fastapi.responses import HTMLResponse
    from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
    from prometheus_client import (
        CONTENT_TYPE_LATEST,
        CollectorRegistry,
        Counter,
        Gauge,
        Histogram,
        generate_latest,
    )
    from pydantic import BaseModel, ConfigDict, Field
except ImportError as error:  # pragma: no cover - depends on the installation
    raise ImportError(f"recbole-llm serve needs {error.name}: pip install 'recbole_llm[serve]'") from error

logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and what the server keeps.

    Attributes:
        body: bytes of a request's body; more is answered with 413.
        pairs: pairs of a ``/score``; more is answered with 422, as are the next three.
        users: users of a ``/recommend``.
        candidates: candidates of a ``/recommend``.
        top: items per user.
        interactions: interactions of one ``/interactions``.
        id_length: characters of an id.
        batch: pairs that are scored in one call.
        queue: requests that may wait; more are answered with 503.
        users_kept: users whose recommendations are kept.
    """

    body: int = 1 << 20
    pairs: int = 1000
    users: int = 100
    candidates: int = 1000
    top: int = 200
    interactions: int = 1000
    id_length: int = 200
    batch: int = 256
    queue: int = 1000
    users_kept: int = 10_000


class Batcher:
    """Scores pairs of several requests in one call, and runs everything that touches the model in one thread.

    Args:
        limits: ``batch`` and ``queue``.
        observe: told the number of pairs of every call.
    """

    def __init__(self, run: ServedRun, limits: Limits, observe: Callable[[int], None]) -> None:
        self._run, self._limits, self._observe = run, limits, observe
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._waiting: list[Waiting] = []
        self._busy = False
        self._pending: set[asyncio.Task] = set()

    async def score(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Scores of pairs of internal ids, float64 ``[n]``.

        Raises:
            HTTPException: 503 where too many requests wait.
        """
        if len(self._waiting) >= self._limits.queue:
            raise HTTPException(503, "too many requests wait; try again later", headers={"Retry-After": "1"})
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((users, items, future))
        if not self._busy:
            self._busy = True
            task = asyncio.create_task(self._drain())
            self._pending.add(task)
            task.add_done_callback(self._pending.discard)
        return await future

    async def call(self, function: Callable[[], Any]) -> Any:
        """The result of a function that uses the model, run in the model's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def _drain(self) -> None:
        try:
            while self._waiting:
                batch: list[Waiting] = []
                size = 0
                while self._waiting and (not batch or size + len(self._waiting[0][0]) <= self._limits.batch):
                    request = self._waiting.pop(0)
                    if not request[2].cancelled():  # its client went away
                        batch.append(request)
                        size += len(request[0])
                if not batch:
                    continue
                self._observe(size)
                users, items = (np.concatenate([request[i] for request in batch]) for i in (0, 1))
                try:
                    scores = await self.call(partial(self._run.score, users, items))
                except Exception as error:  # every waiting request gets it
                    for _, _, future in batch:
                        if not future.done():
                            future.set_exception(error)
                    continue
                start = 0
                for part, _, future in batch:
                    if not future.done():
                        future.set_result(scores[start : start + len(part)])
                    start += len(part)
        finally:
            self._busy = False

    async def close(self) -> None:
        """Finish what was accepted."""
        while self._pending:
            await asyncio.gather(*self._pending, return_exceptions=True)
        self._thread.shutdown(wait=True)


def create_app(run: ServedRun, *, token: str | None, limits: Limits = Limits()) -> FastAPI:  # noqa: B008 - frozen
    """The application.

    Args:
        run: a loaded run; the application owns it from now on.
        token: what clients send as ``Authorization: Bearer ...``; ``None``: everyone is answered.
        limits: see :class:`Limits`.
    """
    Id = Annotated[str, Field(min_length=1, max_length=limits.id_length)]

    class Strict(BaseModel):
        model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    class Pair(Strict):
        user: Id
        item: Id

    class ScoreRequest(Strict):
        pairs: Annotated[list[Pair], Field(min_length=1, max_length=limits.pairs)]

    class ScoredPair(BaseModel):
        user: str
        item: str
        score: float

    class ScoreAnswer(BaseModel):
        scores: list[ScoredPair]
        scale: str
        unknown_users: list[str]
        unknown_items: list[str]

    class RecommendRequest(Strict):
        users: Annotated[list[Id], Field(min_length=1, max_length=limits.users)]
        top: Annotated[int, Field(ge=1, le=limits.top)] = 10
        exclude_seen: bool = True
        candidates: Annotated[list[Id], Field(min_length=1, max_length=limits.candidates)] | None = None
        retrieve: Annotated[int, Field(ge=0)] | None = None

    class Recommended(BaseModel):
        rank: int
        item: str
        title: str
        score: float
        stage: str

    class RecommendAnswer(BaseModel):
        users: dict[str, list[Recommended]]
        unknown_users: list[str]
        unknown_items: list[str]

    class InteractionsRequest(Strict):
        interactions: Annotated[
            list[dict[str, str | float | int]], Field(min_length=1, max_length=limits.interactions)
        ]
        items: Annotated[
            list[dict[str, str | float | int]] | None, Field(min_length=1, max_length=limits.interactions)
        ] = None

    class InteractionsAnswer(BaseModel):
        interactions: int
        new_users: int
        new_items: int
        late: int

    class Health(BaseModel):
        status: str
        model: str
        dataset: str
        users: int
        items: int
        scale: str

    registry = CollectorRegistry()
    requests = Counter("recbole_llm_requests", "Requests", ["path", "status"], registry=registry)
    seconds = Histogram("recbole_llm_request_seconds", "Time to answer", ["path"], registry=registry)
    waiting = Gauge(
        "recbole_llm_in_progress", "Requests that are being answered", ["path"], registry=registry
    )
    sizes = Histogram(
        "recbole_llm_batch_pairs",
        "Pairs per call of the model",
        registry=registry,
        buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    )
    hits = Counter("recbole_llm_kept", "Recommendations that were kept", ["found"], registry=registry)
    if run.prefixes is not None:
        prefixes = run.prefixes.kept
        for name, meaning, value in (
            ("found", "Beginnings of prompts whose keys and values were kept", lambda: prefixes.found),
            ("missed", "Beginnings of prompts that went through the model", lambda: prefixes.missed),
            ("bytes", "Bytes of kept keys and values", lambda: prefixes.used),
        ):
            Gauge(f"recbole_llm_prefix_{name}", meaning, registry=registry).set_function(value)
    batcher, kept = Batcher(run, limits, sizes.observe), Kept[tuple, list[dict]](limits.users_kept)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI):
        yield
        await batcher.close()

    bearer = HTTPBearer(auto_error=False)

    def authorised(sent: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        given = sent.credentials if sent else ""
        if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
            raise HTTPException(401, "a valid token is needed", headers={"WWW-Authenticate": "Bearer"})

    app = FastAPI(
        title="recbole_llm",
        description=f"{run.config['model']} trained on {run.config['dataset']}",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load their scripts from another host
        redoc_url=None,
    )
    app.add_middleware(BodyLimit, limit=limits.body)

    @app.get("/docs", include_in_schema=False)
    async def documentation() -> HTMLResponse:
        return HTMLResponse(openapi_page(app.openapi()))

    @app.middleware("http")
    async def measured(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        known = {"/score", "/recommend", "/interactions", "/health", "/metrics"}
        path = request.url.path if request.url.path in known else "other"
        with seconds.labels(path).time(), waiting.labels(path).track_inprogress():
            response = await call_next(request)
        requests.labels(path, str(response.status_code)).inc()
        return response

    @app.exception_handler(ValueError)
    async def refused(_: Request, error: ValueError) -> Response:
        return Response(_message(str(error)), status_code=422, media_type="application/json")

    guard = [Depends(authorised)]
    user_field, item_field = run.dataset.uid_field, run.dataset.iid_field

    @app.get("/health")
    async def health() -> Health:
        """Whether the server answers, and with what."""
        return Health(
            status="ok",
            model=run.config["model"],
            dataset=run.config["dataset"],
            users=run.dataset.user_num - 1,
            items=run.dataset.item_num - 1,
            scale=run.scale,
        )

    @app.get("/metrics", dependencies=guard, response_class=Response)
    async def metrics() -> Response:
        """Counters and times for Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/score", dependencies=guard)
    async def score(request: ScoreRequest) -> ScoreAnswer:
        """The score of every pair; pairs of unknown users or items are left out and named."""
        users = run.ids(user_field, [pair.user for pair in request.pairs])
        items = run.ids(item_field, [pair.item for pair in request.pairs])
        unknown = {*users.unknown}, {*items.unknown}
        pairs = [p for p in request.pairs if p.user not in unknown[0] and p.item not in unknown[1]]
        found: list[float] = []
        if pairs:
            owners = run.ids(user_field, [pair.user for pair in pairs]).known
            targets = run.ids(item_field, [pair.item for pair in pairs]).known
            run.check_users(owners)
            run.check_items(targets)
            found = (await batcher.score(owners, targets)).tolist()
        return ScoreAnswer(
            scores=[ScoredPair(user=p.user, item=p.item, score=s) for p, s in zip(pairs, found, strict=True)],
            scale=run.scale,
            unknown_users=users.unknown,
            unknown_items=items.unknown,
        )

    @app.post("/recommend", dependencies=guard)
    async def recommended(request: RecommendRequest) -> RecommendAnswer:
        """The best items of every user; unknown users and candidates are left out and named."""
        people = run.ids(user_field, request.users)
        run.check_users(people.known)
        named, missing, wanted = None, [], None
        if request.candidates is not None:
            candidates = run.ids(item_field, request.candidates)
            named, missing, wanted = (
                tuple(request.candidates),
                candidates.unknown,
                np.unique(candidates.known),
            )
            run.check_items(wanted)
        options = (request.top, request.exclude_seen, named, request.retrieve)

        async def of_user(user: int) -> list[dict]:
            key = (run.tokens(user_field, [user])[0], *options)
            found = kept.get(key)
            hits.labels("yes" if found is not None else "no").inc()
            if found is None:
                before = run.new.interactions
                choice = await batcher.call(
                    lambda: choose(run, user, request.top, request.exclude_seen, wanted, request.retrieve)
                )
                if choice.listed:
                    scores = await batcher.call(lambda: run.score_listed(user, choice.items))
                else:
                    scores = await batcher.score(np.full(len(choice.items), user), choice.items)
                found = ranked(run, choice, scores, request.top).drop(columns="user").to_dict("records")
                if run.new.interactions == before:
                    kept.put(key, found)
            return found

        users = list(dict.fromkeys(people.known.tolist()))
        lists = await asyncio.gather(*(of_user(user) for user in users))
        answer = {
            name: [Recommended(**row) for row in rows]
            for name, rows in zip(run.tokens(user_field, users), lists, strict=True)
        }
        return RecommendAnswer(users=answer, unknown_users=people.unknown, unknown_items=missing)

    @app.post("/interactions", dependencies=guard)
    async def interactions(request: InteractionsRequest) -> InteractionsAnswer:
        """Append later interactions; kept in memory only.

        Column names are those of the data's ``.inter`` file; ``items`` has the titles of new items, with the column
        names of its ``.item`` file.
        """
        table = pd.DataFrame(request.interactions)
        titles = None if request.items is None else pd.DataFrame(request.items)
        counts = await batcher.call(lambda: run.append(table, titles))
        changed = set(table[user_field].astype(str))
        kept.forget([key for key in kept.keys() if counts["new_items"] or key[0] in changed])
        return InteractionsAnswer(**counts)

    return app


def _message(text: str) -> str:
    return json.dumps({"detail": text})


class BodyLimit:
    """Answers requests whose body is larger than a limit with 413, before anything reads them.

    Args:
        app: the application behind it.
        limit: bytes.
    """

    def __init__(self, app: Any, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        body, more, too_large = b"", True, declared.isdigit() and int(declared) > self.limit
        while more and not too_large:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more, too_large = message.get("more_body", False), len(body) > self.limit
        if too_large:
            answer = _message(f"the body is larger than {self.limit} bytes").encode()
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 413, "headers": headers})
            await send({"type": "http.response.body", "body": answer})
            return
        sent = False

        async def again() -> dict:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, send)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address; port 0 takes a free one.

    Raises:
        OSError: if the port is in use.
    """
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}; name another --port") from error
    return listening


def serve(
    run: ServedRun, listening: socket.socket, *, token: str | None, limits: Limits, grace: int = 60
) -> None:
    """Answer until SIGTERM or Ctrl-C, then finish what was accepted.

    Args:
        run: a loaded run.
        listening: of :func:`listen`.
        token: see :func:`create_app`.
        limits: see :class:`Limits`.
        grace: seconds that accepted requests have at the end.
    """
    host, port = listening.getsockname()[:2]
    where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"serving {run.config['model']} on {where} (documentation: {where}/docs)", flush=True)
    config = uvicorn.Config(
        create_app(run, token=token, limits=limits), log_level="warning", timeout_graceful_shutdown=grace
    )
    uvicorn.Server(config).run(sockets=[listening])


def new_token() -> str:
    """A random token."""
    return secrets.token_urlsafe(24)


def openapi_page(api: dict[str, Any]) -> str:
    """An OpenAPI description as one page of HTML that needs no other host."""
    schemas = api["components"]["schemas"]

    def fields(call: dict[str, Any]) -> dict[str, Any]:
        """The schema of a call's body; empty if it has none."""
        body = call.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
        return schemas.get(body.get("$ref", "").rpartition("/")[2], {})

    template = Environment(autoescape=True, trim_blocks=True, loader=FileSystemLoader(TEMPLATES))
    return template.get_template("api.html").render(api=api, fields=fields, json=json.dumps)
