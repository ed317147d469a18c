"""Mission control over HTTP: reading is open to whoever reaches the address, writing needs the token."""

from __future__ import annotations

import asyncio
import hmac
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from esper_ray.nissa.core import Nissa
from esper_ray.nissa.metrics import CONTENT_TYPE
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock

_WEB = Path(__file__).with_name("web")
_WRITES_PER_MINUTE = 20
_STREAM_SECONDS = 0.5
_BEARER = HTTPBearer(auto_error=False)
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; connect-src 'self' ws: wss:",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


class WriteLimit:
    """So many writes per minute and token."""

    def __init__(self, limit: int = _WRITES_PER_MINUTE, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._limit, self._clock = limit, clock
        self._times: deque[float] = deque()

    def allow(self) -> bool:
        now = self._clock.monotonic()
        while self._times and self._times[0] <= now - 60.0:
            self._times.popleft()
        if len(self._times) >= self._limit:
            return False
        self._times.append(now)
        return True


def create_app(nissa: Nissa, token: str, *, clock: Clock = SYSTEM_CLOCK) -> FastAPI:
    """The application; `serve` runs it."""
    app = FastAPI(title="esper_ray mission control", docs_url=None, redoc_url=None)
    limit = WriteLimit(clock=clock)

    def may_write(given: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]) -> None:
        if given is None or not hmac.compare_digest(given.credentials.encode(), token.encode()):
            raise HTTPException(
                401, "This needs the token that was printed at start-up.", {"WWW-Authenticate": "Bearer"}
            )
        if not limit.allow():
            raise HTTPException(429, f"At most {_WRITES_PER_MINUTE} changes per minute are taken.")

    @app.middleware("http")
    async def add_headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    _add_reading(app, nissa)
    _add_pages(app)

    @app.post("/api/alerts/{id}/ack", dependencies=[Depends(may_write)])
    def acknowledge(id: str) -> dict[str, Any]:
        alert = nissa.acknowledge(id)
        if alert is None:
            raise HTTPException(404, f"There is no alert {id}.")
        return alert

    @app.websocket("/ws/stream")
    async def stream(socket: WebSocket, run: str = "") -> None:
        await socket.accept()
        try:
            await _stream(socket, nissa, run)
        except WebSocketDisconnect:
            return

    return app


def _add_reading(app: FastAPI, nissa: Nissa) -> None:
    def details(run: str) -> dict[str, Any]:
        found = nissa.run(run or nissa.current())
        if found is None:
            raise HTTPException(404, f"There is no run {run}." if run else "No run has been heard of yet.")
        return found

    @app.get("/api/status")
    def status() -> dict[str, Any]:
        return nissa.status()

    @app.get("/api/runs/{run}")
    def one_run(run: str) -> dict[str, Any]:
        return details(run)

    @app.get("/api/seeds")
    def seeds(run: str = "") -> list[dict[str, Any]]:
        return list(details(run)["seeds"])

    @app.get("/api/decisions")
    def decisions(run: str = "", limit: Annotated[int, Query(ge=1, le=400)] = 100) -> list[dict[str, Any]]:
        return list(details(run)["decisions"][:limit])

    @app.get("/api/school")
    def school() -> dict[str, Any]:
        return nissa.school()

    @app.get("/api/alerts")
    def alerts() -> list[dict[str, Any]]:
        return nissa.alert_list()

    @app.get("/api/events")
    def events(
        text: str = "", run: str = "", kind: str = "", limit: Annotated[int, Query(ge=1, le=1000)] = 100
    ) -> list[dict[str, Any]]:
        return nissa.events(text, run=run, kind=kind, limit=limit)

    @app.get("/metrics")
    def metrics() -> Response:
        with nissa.ingest.lock:
            return Response(nissa.metrics.exposition(), media_type=CONTENT_TYPE)

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz")
    def readyz() -> Response:
        checks = dict(nissa.readiness())
        return JSONResponse({"ready": all(checks.values()), **checks}, 200 if all(checks.values()) else 503)


def _add_pages(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(_WEB / "index.html", media_type="text/html")

    @app.get("/page.js", include_in_schema=False)
    def script() -> FileResponse:
        return FileResponse(_WEB / "page.js", media_type="text/javascript")

    @app.get("/school.js", include_in_schema=False)
    def school_script() -> FileResponse:
        return FileResponse(_WEB / "school.js", media_type="text/javascript")

    @app.get("/page.css", include_in_schema=False)
    def style() -> FileResponse:
        return FileResponse(_WEB / "page.css", media_type="text/css")


async def _stream(socket: WebSocket, nissa: Nissa, run: str) -> None:
    """Send the page's data whenever something is new, at most twice a second, until the reader leaves."""
    listening = asyncio.ensure_future(socket.receive())
    seen = -1
    try:
        while not listening.done():
            if nissa.version != seen:
                seen = nissa.version
                status = await asyncio.to_thread(nissa.status)
                details = await asyncio.to_thread(nissa.run, run or status["current"] or "")
                school = await asyncio.to_thread(nissa.school)
                await socket.send_json({"status": status, "run": details, "school": school})
            await asyncio.wait({listening}, timeout=_STREAM_SECONDS)
    finally:
        listening.cancel()
