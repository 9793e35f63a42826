"""The web application: routes, authentication, static pages."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pydantic_core
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from fourfold.api import errors
from fourfold.api.chat import Reply, read_body, stream, whole
from fourfold.api.convert import to_request
from fourfold.api.errors import ApiError
from fourfold.api.schemas import ChatRequest
from fourfold.serve.engine import Engine
from fourfold.serve.request import Request as EngineRequest

PAGES = Path(__file__).parent.parent / "web"
ASSETS = {"/": "index.html"} | {f"/{name}": name for name in ("style.css", "app.js", "examples.js", "request.js")}
MAX_BODY = 48 << 20  # bytes
PREPARING = 2  # requests whose media are decoded at the same time
SECURITY = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob: data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def create_app(engine: Engine, model_name: str, api_key: str | None = None, max_body: int = MAX_BODY) -> FastAPI:
    """The application that serves ``engine`` as ``model_name``; with ``api_key``, all of ``/v1`` asks for it."""
    preparing = ThreadPoolExecutor(PREPARING, thread_name_prefix="fourfold-prepare")
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        preparing.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="Fourfold", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    errors.install(app)

    def authenticate(request: Request) -> None:
        sent = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if api_key is not None and not hmac.compare_digest(sent.encode(), api_key.encode()):
            raise ApiError("A valid API key is needed: Authorization: Bearer KEY", status=401, code="invalid_api_key")

    v1 = APIRouter(prefix="/v1", dependencies=[Depends(authenticate)])

    def model_body() -> dict[str, Any]:
        context = engine.config.max_position_embeddings
        return {
            "id": model_name,
            "object": "model",
            "created": created,
            "owned_by": "fourfold",
            "context_window": context,
            "max_output_tokens": context - 1,
            "input_modalities": ["text", *engine.config.media.modalities],
            "output_modalities": ["text"],
        }

    def known(name: str) -> None:
        if name != model_name:
            message = f"The model {name!r} is not served here; {model_name!r} is"
            raise ApiError(message, status=404, param="model", code="model_not_found")

    def prepare(data: bytes) -> tuple[ChatRequest, EngineRequest]:
        try:
            raw = pydantic_core.from_json(data, allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(f"The body is not valid JSON: {error}", code="invalid_json") from error
        try:
            body = ChatRequest.model_validate(raw)
        except ValidationError as error:
            raise errors.from_validation(error, raw) from error
        known(body.model)
        return body, to_request(body, engine)

    @v1.post("/chat/completions")
    async def chat(request: Request) -> Response:
        try:
            data = await read_body(request, max_body)
            body, wanted = await asyncio.get_running_loop().run_in_executor(preparing, prepare, data)
            handle = engine.submit(wanted)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:
            return errors.response(error)
        reply = Reply(model_name, f"fourfold-{model_name}")
        try:
            return stream(handle, reply, body) if body.stream else await whole(handle, reply, request)
        except Exception as error:
            return errors.response(error)

    @v1.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_body()]}

    @v1.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        known(name)
        return model_body()

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = engine.alive
        return JSONResponse({"status": "ok" if alive else "stopped", **engine.stats()}, 200 if alive else 503)

    def page(file: str) -> Callable[[], Awaitable[Response]]:
        async def asset() -> Response:
            return FileResponse(PAGES / file, headers=SECURITY)

        return asset

    app.include_router(v1)
    for path, file in ASSETS.items():
        app.add_api_route(path, page(file), methods=["GET"], include_in_schema=False)
    return app
