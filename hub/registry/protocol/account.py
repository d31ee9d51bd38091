"""Who am I, may I write here, is this card's YAML sound."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse

from hub.registry.context import caller_of, context_of, downloading, writing
from hub.registry.errors import ApiError
from hub.registry.protocol.bodies import read_object
from hub.registry.state.front_matter import CardError, parse_front_matter

router = APIRouter()


async def json_body(request: Request) -> dict[str, Any]:
    """Body of a request as a JSON object, capped; it is read when the caller may do what the request is about.

    Whoever has no token waits for nothing and costs nothing: of a body that the answer does not depend on, no byte is
    taken in.
    """
    await run_in_threadpool(_admit, request)
    return await read_object(request, context_of(request).limits)


def _admit(request: Request) -> None:
    """Raise what the route would raise, as far as that does not depend on the body."""
    names = request.path_params
    if "ns" in names and "name" in names:
        writing(request, names["ns"], names["name"])
    elif caller_of(request).anonymous:
        raise ApiError(401, "Send a token with write access (HF_TOKEN, or `hf auth login`)")


async def open_body(request: Request) -> dict[str, Any]:
    """As `json_body`, for a question that everybody may ask."""
    return await read_object(request, context_of(request).limits)


JsonBody = Annotated[dict[str, Any], Depends(json_body)]


@router.get("/api/whoami-v2")
def whoami(request: Request) -> JSONResponse:
    """Describe the token: its name, its role, and the namespaces it owns as organizations."""
    caller = caller_of(request)
    if caller.anonymous:
        raise ApiError(401, "Send a token (HF_TOKEN, or `hf auth login`)")
    role = "write" if caller.write else "read"
    return JSONResponse(
        {
            "type": "user",
            "id": caller.name,
            "name": caller.home,
            "fullname": caller.name,
            "isPro": False,
            "orgs": [{"type": "org", "name": name, "roleInOrg": "write"} for name in caller.namespaces],
            "auth": {"type": "access_token", "accessToken": {"displayName": caller.name, "role": role}},
        }
    )


@router.post("/api/validate-yaml")
def validate_yaml(request: Request, body: Annotated[dict[str, Any], Depends(open_body)]) -> JSONResponse:
    """Check the YAML in front of a card before anything is uploaded."""
    caller_of(request)
    try:
        parse_front_matter(str(body.get("content", "")))
    except CardError as error:
        return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, 400)
    return JSONResponse({"errors": [], "warnings": []})


@router.get("/api/models/{ns}/{name}/auth-check")
def auth_check(request: Request, ns: str, name: str) -> JSONResponse:
    """Say whether the caller may read the files of a repository."""
    downloading(request, ns, name)
    return JSONResponse({})


@router.get("/api/models/{ns}/{name}/auth-check/write")
def auth_check_write(request: Request, ns: str, name: str) -> JSONResponse:
    """Say whether the caller may change a repository."""
    writing(request, ns, name)
    return JSONResponse({})
