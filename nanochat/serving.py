"""
Many clients, one model: requests that wait together are answered as one batch, and batches that began at different times
take turns, a step each, in one thread. A request that arrives is never kept waiting for a long answer to end.
"""
import asyncio
import collections
import threading
import time
import traceback
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field

from nanochat.chat import stop_tokens
from nanochat.common import print0
from nanochat.engine import Compute, Engine, total_flops

MAX_BATCH = 16      # rows of one batch
EVERY = 16          # tokens between two reports of the compute that an answer has saved


@dataclass(frozen=True)
class Options:
    """How an answer is drawn; requests with equal options (and the same compute) share a batch. seed None: any."""
    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float | None = None
    seed: int | None = None


@dataclass(eq=False)
class Request:
    """A prompt on its way through the worker; what comes back is read with `events`."""
    prompt: list[int]
    max_tokens: int
    compute: Compute = field(default_factory=Compute)
    options: Options = field(default_factory=Options)
    cancelled: bool = False
    began: float = 0.0
    tokens: int = 0
    queue: asyncio.Queue = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop | None = None

    def send(self, event: dict) -> None:
        """Called by the worker's thread."""
        self.loop.call_soon_threadsafe(self.queue.put_nowait, event)

    async def events(self, timeout: float) -> AsyncIterator[dict]:
        """
        {'token', 'depth', 'width'} for each token, now and then with 'saved'; last {'end': 'stop', 'length' or 'timeout'}
        with 'saved' and 'tok_per_s', or {'error'}. The request is cancelled when nobody reads on.
        """
        deadline = time.monotonic() + timeout
        try:
            while True:
                try:
                    event = await asyncio.wait_for(self.queue.get(), deadline - time.monotonic())
                except TimeoutError:
                    event = {"end": "timeout"}
                yield event
                if "end" in event or "error" in event:
                    return
        finally:
            self.cancelled = True


class Full(RuntimeError):
    """More requests wait than the worker takes."""


class _Batch:
    """Requests that are answered together, on an engine of their own: an engine's traces are those of its last call."""
    def __init__(self, worker: "Worker", requests: list[Request]):
        self.requests, self.ended = requests, set()
        self.engine = Engine(worker.model, worker.tokenizer, worker.calibration)
        first, options = requests[0], asdict(requests[0].options)
        seed = options.pop("seed")
        compute = asdict(first.compute)
        if compute["mode"] != "auto" and not compute["lossless"]:
            compute["mode"] = [r.compute.mode for r in requests]
        self.steps = self.engine.stream(
            [r.prompt for r in requests], max(r.max_tokens for r in requests), stop=worker.stop, ended=self.ended,
            seed=worker.next_seed() if seed is None else seed, **compute, **options)

    def step(self) -> bool:
        """One step of all rows; whether there is another."""
        for row, request in enumerate(self.requests):
            if request.cancelled:
                self.ended.add(row)
        pairs = next(self.steps, None)
        if pairs is None or len(self.ended) == len(self.requests):
            for row in range(len(self.requests)):
                self.end(row, "stop")
            self.steps.close()
            return False
        for row, token in pairs:
            request = self.requests[row]
            if row in self.ended:
                continue
            depth, widths = self.engine.traces[row].steps[request.tokens]
            request.tokens += 1
            event = {"token": token, "depth": depth, "width": sum(widths[:depth]) / max(1, depth)}
            if request.tokens % EVERY == 0:
                event |= self.saved(row)
            request.send(event)
            if request.tokens == request.max_tokens:
                self.end(row, "length")
        return True

    def end(self, row: int, reason: str) -> None:
        request = self.requests[row]
        if row not in self.ended:
            self.ended.add(row)
            seconds = time.perf_counter() - request.began
            request.send({"end": reason, "tokens": request.tokens, "tok_per_s": request.tokens / seconds, **self.saved(row)})

    def saved(self, row: int) -> dict:
        """The share of full compute's FLOPs that the row's answer and prompt have saved so far."""
        trace = self.engine.traces[row]
        if not trace.steps:
            return {"saved": 0.0}
        spent, full = total_flops(trace.flops(self.engine.model))
        return {"saved": 1 - spent / full if full else 0.0}


class Worker:
    """
    The thread that decodes. waiting_limit: how many requests may wait for their batch to begin. `stats` counts what it has
    done since it began.
    """
    def __init__(self, model, tokenizer, calibration=None, waiting_limit: int = 64):
        self.model, self.tokenizer, self.calibration, self.waiting_limit = model, tokenizer, calibration, waiting_limit
        self.stop = stop_tokens(tokenizer)
        self.waiting: collections.deque[Request] = collections.deque()
        self.batches: list[_Batch] = []
        self.stats = {"requests": 0, "tokens": 0, "errors": 0, "largest_batch": 0}
        self._seed, self._closing = 0, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    def __enter__(self) -> "Worker":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def next_seed(self) -> int:
        self._seed += MAX_BATCH
        return self._seed

    def submit(self, request: Request) -> None:
        """Queues a request; called in the event loop that reads its events. Full where too many wait."""
        request.loop = asyncio.get_running_loop()
        with self._changed:
            if len(self.waiting) >= self.waiting_limit:
                raise Full(f"{len(self.waiting)} requests are waiting already: try again in a moment")
            self.waiting.append(request)
            self.stats["requests"] += 1
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self.waiting or self.batches or self._closing):
                    self._changed.wait()
                if self._closing:
                    return
                groups = self._take()
            for requests in groups:
                self._guarded(requests, lambda requests=requests: self.batches.append(_Batch(self, requests)))
            for batch in list(self.batches):
                before = sum(r.tokens for r in batch.requests)
                if not self._guarded(batch.requests, batch.step):
                    self.batches.remove(batch)
                self.stats["tokens"] += sum(r.tokens for r in batch.requests) - before

    def _take(self) -> list[list[Request]]:
        """What waits, in groups that can be one batch."""
        groups: dict = {}
        while self.waiting:
            request = self.waiting.popleft()
            if request.cancelled:
                continue
            request.began = time.perf_counter()
            c, o = request.compute, request.options
            alike = (c.mode if c.mode == "auto" or c.lossless else None, c.budget, c.lossless, o)
            groups.setdefault((alike, id(request)) if o.seed is not None else alike, []).append(request)
        out = [g[i:i + MAX_BATCH] for g in groups.values() for i in range(0, len(g), MAX_BATCH)]
        self.stats["largest_batch"] = max([self.stats["largest_batch"], *map(len, out)])
        return out

    def _guarded(self, requests: list[Request], action):
        """action(); an error ends these requests and nothing else, and its message goes to their clients."""
        try:
            return action()
        except Exception as e:
            self.stats["errors"] += 1
            if not isinstance(e, ValueError):
                print0(traceback.format_exc())
            message = str(e) if isinstance(e, ValueError) else "the server failed on this request; its log has the reason"
            for request in requests:
                request.send({"error": message})
            return None
