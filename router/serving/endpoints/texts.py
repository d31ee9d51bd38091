"""POST /v1/classify, /v1/embeddings, /tokenize and /detokenize: what is said of texts, without writing."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from router.serving.errors import FieldError
from router.serving.server import Server, answer
from router.serving.wire.body import identifier
from router.serving.wire.others import Classify, ClassifyAnswer, Detokenize, Embed, Tokenize, classified, embedded


async def classify(server: Server, request: Request) -> Response:
    """Labels with their probabilities."""
    asked = await server.body(request, Classify)
    rows = await server.rows(asked.requests(), "classify")
    results = await rows.results(request)
    data = [classified(i, result) for i, result in enumerate(results)]
    ident, told = identifier("classify"), server.count(results)
    return answer(ClassifyAnswer(id=ident, model=asked.model, data=data, usage=told), rows)


async def embeddings(server: Server, request: Request) -> Response:
    """Vectors of texts."""
    asked = await server.body(request, Embed)
    asked.check(server.engine.host.width)
    rows = await server.rows(asked.requests(), "embed")
    results = await rows.results(request)
    server.count(results)
    return answer(embedded(asked, results), rows)


async def tokenize(server: Server, request: Request) -> Response:
    """The tokens that a completion would read."""
    asked = await server.body(request, Tokenize)
    row = await run_in_threadpool(lambda: server.engine.prepare(asked.request()))
    told = {"count": len(row.ids), "max_model_len": server.engine.host.context, "tokens": row.ids}
    return JSONResponse(told)


async def detokenize(server: Server, request: Request) -> Response:
    """The text of tokens."""
    asked = await server.body(request, Detokenize)
    most = len(server.engine.host.tokenizer)
    if wrong := [token for token in asked.tokens if not 0 <= token < most]:
        raise FieldError("tokens", f"there is no token {wrong[0]}", hint=f"tokens are 0 to {most - 1}")
    return JSONResponse({"prompt": server.decoded(asked.tokens)})
