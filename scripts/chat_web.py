r"""
Serves a chat model: a page to talk to it and see what each token cost, and an OpenAI-compatible interface.

    python -m scripts.chat_web --checkpoint ~/.cache/nanochat/fractal_checkpoints/d32_2048_unfrozen_auto
    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \
        -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}], "mode": "auto"}'

Beyond OpenAI's fields a request may have mode, budget, lossless and top_k. The server listens to this machine alone unless
--host says otherwise; it has no accounts and no encryption, so put a proxy that has them before it on a network.
"""
import argparse
import json
import socket
import time
import uuid
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from nanochat import checkpoint_manager as ckpt
from nanochat import serving
from nanochat.chat import check_chats, fit, prompt_room, visible_text
from nanochat.common import autodetect_device_type, cli, print0
from nanochat.confidence_probe import is_trained
from nanochat.engine import Compute, prepare_inference

PAGE = Path(serving.__file__).with_name("ui.html")
MAX_CHARS = 256_000  # of all messages of a request together: encoding them keeps the server from its other clients
Text = Annotated[str, Field(max_length=32_000)]


class Message(BaseModel):
    role: Annotated[str, Field(pattern="^(system|user|assistant)$")]
    content: Text


class Sampled(BaseModel):
    """What both completions take. Unknown fields are ignored, as OpenAI's clients send many."""
    max_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=1000)] | None = 50
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=1)] = 1
    stop: Text | list[Text] | None = None
    stream: bool = False
    mode: str | int | None = None
    budget: float | None = None
    lossless: bool = False


class ChatBody(Sampled):
    messages: Annotated[list[Message], Field(min_length=1, max_length=500)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None


class TextBody(Sampled):
    prompt: Text


class Server:
    """What the routes share: the worker, what its model can do, and limits."""
    def __init__(self, worker: serving.Worker, name: str, timeout: float):
        self.worker, self.name, self.timeout, self.began = worker, name, timeout, time.time()
        self.config = worker.model.config
        self.modes = [*self.config.distinct_modes, *(["auto"] if is_trained(worker.model) else [])]

    def request(self, body: Sampled) -> tuple[serving.Request, int]:
        """(the request of a body, queued; how many of its oldest messages were left out to fit the context)."""
        tokenizer, limit, dropped = self.worker.tokenizer, self.config.sequence_len, 0
        compute = Compute(body.mode, body.budget, None, body.lossless)
        compute.check(self.worker.model, self.worker.calibration)
        wanted = getattr(body, "max_completion_tokens", None) or body.max_tokens or min(512, limit // 2)
        if isinstance(body, ChatBody):
            messages = [m.model_dump() for m in body.messages]
            if messages[-1]["role"] != "user":
                raise ValueError("the last message must be the user's")
            if (size := sum(len(m.content) for m in body.messages)) > MAX_CHARS:
                raise ValueError(f"the messages have {size:,} characters together, and this server takes {MAX_CHARS:,}: "
                                 "leave the oldest out")
            ids, dropped = fit(tokenizer, messages, prompt_room(limit, wanted))
        else:
            ids = tokenizer.encode(body.prompt, prepend="<|bos|>")
            if len(ids) >= limit:
                raise ValueError(f"the prompt has {len(ids)} tokens, and the model's context holds {limit}: shorten it")
        options = serving.Options(body.temperature, body.top_k, body.top_p, body.seed)
        request = serving.Request(ids, min(wanted, limit - len(ids)), compute, options)
        self.worker.submit(request)
        return request, dropped


async def texts(server: Server, request: serving.Request, stops: list[str]):
    """(piece of text, event) of each token, the last with the event of the end; a stop text ends the answer before it."""
    tokens: list[int] = []
    pieces = visible_text(server.worker.tokenizer, _fed(tokens))
    held, longest = "", max(map(len, stops), default=0)
    async for event in request.events(server.timeout):
        if "token" in event:
            tokens.append(event["token"])
            held += next(pieces)
            if at := min((i for s in stops if (i := held.find(s)) >= 0), default=-1) + 1:
                yield held[:at - 1], {"end": "stop", "tokens": request.tokens}
                return
            ready = len(held) - max(longest - 1, 0)  # the rest may be the beginning of a stop text
            yield held[:max(ready, 0)], event
            held = held[max(ready, 0):]
        else:
            yield held, event


def _fed(tokens: list[int]):
    """Each token as soon as it is in the list."""
    while True:
        yield tokens.pop(0)


def openai_routes(app: FastAPI, server: Server) -> None:
    """The routes of OpenAI's interface: models, chat completions and completions."""
    def answer_of(body, text, event):
        chat = isinstance(body, ChatBody)
        choice = {"index": 0, "finish_reason": finish_reason(event)}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return choice

    def envelope(body, streamed=False):
        kind = "chat.completion" if isinstance(body, ChatBody) else "text_completion"
        return {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": server.name,
                "object": kind + (".chunk" if streamed and isinstance(body, ChatBody) else "")}

    async def complete(body, http: Request):
        request, dropped = server.request(body)
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        if body.stream:
            return StreamingResponse(stream(body, request, stops, dropped), media_type="text/event-stream")
        whole, event = "", {}
        async for piece, event in texts(server, request, stops):  # noqa: B007  (the last event is read below)
            whole += piece
            if await http.is_disconnected():
                request.cancelled = True
                break
        if "error" in event:
            return problem(500, event["error"])
        usage = {"prompt_tokens": len(request.prompt), "completion_tokens": request.tokens,
                 "total_tokens": len(request.prompt) + request.tokens}
        return {**envelope(body), "choices": [answer_of(body, whole, {"end": "stop", **event})], "usage": usage,
                "compute": {"saved": event.get("saved"), "dropped_messages": dropped}}

    async def stream(body, request, stops, dropped):
        head, chat, first = envelope(body, streamed=True), isinstance(body, ChatBody), True
        async for piece, event in texts(server, request, stops):
            if "error" in event:
                yield _sse({"error": {"message": event["error"], "type": "server_error"}})
                break
            delta = {"content": piece} | ({"role": "assistant"} if first else {})
            choice = {"index": 0, "finish_reason": finish_reason(event), **({"delta": delta} if chat else {"text": piece})}
            extra = {k: event[k] for k in ("depth", "width", "saved", "tok_per_s") if k in event}
            yield _sse({**head, "choices": [choice], "compute": extra | ({"dropped_messages": dropped} if first else {})})
            first = False
        yield "data: [DONE]\n\n"

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, http: Request):
        return await complete(body, http)

    @app.post("/v1/completions")
    async def completions(body: TextBody, http: Request):
        return await complete(body, http)

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [{"id": server.name, "object": "model", "created": int(server.began),
                                            "owned_by": "user"}]}


def finish_reason(event: dict) -> str | None:
    """OpenAI's word for how an answer ended, None where it goes on; a time-out is a length to its clients."""
    return "length" if event.get("end") == "timeout" else event.get("end")


def _sse(data: dict) -> str:
    return f"data: {json.dumps(data)}\n\n"


def problem(status: int, message: str, kind: str = "invalid_request_error") -> JSONResponse:
    """An error as OpenAI's clients read it."""
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status_code=status)


def make_app(server: Server) -> FastAPI:
    """The application: the page, nanochat's /chat/completions, OpenAI's routes, /health and /stats."""
    app = FastAPI(title="Adamba", docs_url=None, redoc_url=None, openapi_url=None)
    openai_routes(app, server)

    @app.exception_handler(RequestValidationError)
    async def malformed(_, error: RequestValidationError):
        first = error.errors()[0]
        return problem(400, f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}")

    @app.exception_handler(ValueError)
    async def refused(_, error: ValueError):
        return problem(400, str(error))

    @app.exception_handler(serving.Full)
    async def full(_, error: serving.Full):
        response = problem(503, str(error), "overloaded")
        response.headers["Retry-After"] = "5"
        return response

    @app.get("/", response_class=HTMLResponse)
    async def page():
        return PAGE.read_text(encoding="utf-8")

    @app.post("/chat/completions")
    async def nanochat_completions(body: ChatBody):
        """Server-sent events {"token": text, "depth", "width"}, last {"done": true}, as nanochat's own clients read them."""
        request, dropped = server.request(body)

        async def stream():
            if dropped:
                yield _sse({"dropped": dropped})
            async for piece, event in texts(server, request, []):
                yield _sse(event if "error" in event else {**event, "token": piece, "done": "end" in event})
        return StreamingResponse(stream(), media_type="text/event-stream")

    @app.get("/health")
    async def health():
        return {"status": "ok", "ready": True, "model": server.name, "modes": server.modes, "blocks": server.config.n_block,
                "width": server.config.top_width, "context": server.config.sequence_len}

    @app.get("/stats")
    async def stats():
        w = server.worker
        return {**w.stats, "waiting": len(w.waiting), "batches": len(w.batches),
                "answering": sum(len(b.requests) - len(b.ended) for b in w.batches), "uptime_s": time.time() - server.began}
    return app


def free_socket(host: str, port: int) -> socket.socket:
    """A socket that listens there. ValueError where the port is taken or the address is not this machine's."""
    try:
        return socket.create_server((host, port))
    except OSError as e:
        raise ValueError(f"cannot listen on {host}:{port} ({e.strerror}): another program uses the port, or the address is "
                         "not this machine's; choose another --port or --host") from e


@cli
def main(argv=None) -> None:
    p = argparse.ArgumentParser(description="Serve a chat model: a web page and an OpenAI-compatible interface.")
    ckpt.add_model_args(p)
    p.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all networks (default: this machine)")
    p.add_argument("-p", "--port", type=int, default=8000, help="port to listen on (default: 8000)")
    p.add_argument("--timeout", type=float, default=300, help="seconds that an answer may take (default: 300)")
    p.add_argument("--max-waiting", type=int, default=64, help="requests that may wait; more are refused (default: 64)")
    p.add_argument("--device-type", default=None, choices=["cpu", "cuda"], help="default: cuda where there is one")
    args = p.parse_args(argv)
    if args.timeout <= 0 or args.max_waiting < 1 or not 0 <= args.port < 65536:
        raise ValueError("--timeout and --max-waiting must be positive, and --port a port number")
    listening = free_socket(args.host, args.port)
    device = args.device_type or autodetect_device_type()
    model, tokenizer, info, file = ckpt.load(ckpt.chosen_model(args), device)
    prepare_inference(model, device)
    check_chats(model, tokenizer)
    import uvicorn
    with serving.Worker(model, tokenizer, info.get("calibration"), args.max_waiting) as worker:
        app = make_app(Server(worker, file.parent.name, args.timeout))
        print0(f"serving {file.parent.name} at http://{args.host}:{listening.getsockname()[1]} (Ctrl-C ends)")
        uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)).run(sockets=[listening])


if __name__ == "__main__":
    main()
