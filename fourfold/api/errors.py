"""Every refusal in OpenAI's error shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from fourfold.serve.request import EngineBusy, EngineError, RequestError

log = logging.getLogger(__name__)


class ApiError(Exception):
    """A refusal with its HTTP status; ``param`` is the path of the field, as ``messages[0].content[1].text``."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code, self.headers = message, status, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


CODES = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}


def from_validation(error: ValidationError, raw: Any) -> ApiError:
    """The first complaint about ``raw``, the JSON that was sent."""
    first = error.errors(include_url=False, include_context=False)[0]
    kind = first["type"]
    param = _path(first["loc"], raw, kind == "missing")[1].removeprefix(".")
    if kind == "extra_forbidden":
        message = f"Unknown field: {param}"
    elif kind == "missing":
        message = f"Missing field: {param}"
    else:
        message = f"{param}: {first['msg']}" if param else first["msg"]
    return ApiError(message, param=param or None, code=CODES.get(kind, "invalid_value"))


def _path(location: tuple[int | str, ...], here: Any, missing: bool) -> tuple[float, str]:
    """(cost, path into ``here``). Pydantic puts the names of union members between the real steps, and some are also
    names of fields; so every way to leave steps out is tried, and the cheapest is taken."""
    if not location:
        return 0.0, ""
    step, rest = location[0], location[1:]
    shown = f"[{step}]" if isinstance(step, int) else f".{step}"
    ways = [(1.5, "")]
    if rest:
        cost, path = _path(rest, here, missing)
        ways = [(cost + 1, path)]
    if step in (here if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ()):
        cost, path = _path(rest, here[step], missing)
        ways.append((cost, shown + path))
    elif missing and not rest and isinstance(here, dict):
        ways.append((0.0, shown))
    return min(ways, key=lambda way: way[0])


def translate(error: Exception) -> ApiError:
    """Any exception as a refusal; what is not expected becomes a 500 that tells nothing of the inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        too_long = error.field in ("prompt", "max_tokens")
        param = "messages" if error.field == "prompt" else error.field
        return ApiError(str(error), param=param, code="context_length_exceeded" if too_long else "invalid_value")
    if isinstance(error, ValueError):
        return ApiError(str(error), code="invalid_value")
    if isinstance(error, EngineBusy):
        return ApiError(str(error), status=429, code="engine_overloaded", headers={"Retry-After": "5"})
    if isinstance(error, EngineError):
        return ApiError(str(error), status=503, code="engine_error")
    log.error("an unexpected error", exc_info=error)
    return ApiError("The server failed on this request; its log says why.", status=500, code="internal_error")


def response(error: Exception) -> JSONResponse:
    refusal = translate(error)
    return JSONResponse(refusal.body, refusal.status, headers=refusal.headers)


def install(app: FastAPI) -> None:
    async def any_error(_: Request, error: Exception) -> JSONResponse:
        return response(error)

    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        code = "not_found" if error.status_code == 404 else None
        return response(ApiError(message, status=error.status_code, code=code))

    app.add_exception_handler(HTTPException, http_error)  # type: ignore[arg-type]
    app.add_exception_handler(ApiError, any_error)
    app.add_exception_handler(Exception, any_error)
