"""
Trains a small hybrid on the tasks, then its controls, calibrates them, and measures what adaptive compute costs and saves.

The losses are the package's, as in recipe every of fractal_train: a full pass (teacher, cross-entropy) that learns to answer
at its exit points too, in every second step a narrow pass at sampled widths and exits that learns the teacher's
distribution (and nothing else), then, on the finished model, gate and predictor. Only answers are supervised.
"""
import itertools
import math
import os
import statistics
import tempfile
import time
from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nanochat.checkpoint_manager import build_model, save_export
from nanochat.common import Progress, get_compute_dtype, get_rank, print0
from nanochat.confidence_probe import (
    THRESHOLDS,
    Controls,
    budget_grid,
    by_frequency,
    calibrate,
    calibrate_prices,
    calibrated_thresholds,
    fixed_sequence,
    tune,
)
from nanochat.cpu_decode import MAX_ROWS
from nanochat.distributed import reduce_whole
from nanochat.engine import Engine, Trace, prepare_inference
from nanochat.hybrid_gpt import HybridConfig
from nanochat.loss_eval import ANSWER, Shadow, controls_backward, gate_loss, matryoshka_backward, sample_students
from nanochat.mamba_block import announce_form
from nanochat.matryoshka import norm, token_flops
from nanochat.optim import setup_optimizers
from nanochat.stages import set_trained
from nanochat.step_parts import set_rates
from tiny_experiment.tasks import DIFFICULTIES, Encoder, draw_many, make_tokenizer

EPSILON = 0.05
SCHEDULE = 0.02, 0.98  # shares of the steps that warm up and down


@dataclass(frozen=True)
class Settings:
    """
    Sizes of one run. `pieces`: passes per step, of rows of like length, since padding costs as much as text. processes:
    each on one core, with its own pieces; on a small model that is nearly twice as fast as two threads in one process.
    student_every: steps to one with narrow passes. device_type: where the model runs, 'cpu' or 'cuda'; several processes
    share one GPU.
    """
    steps: int = 1100
    students_from: int = 250  # the step from which narrow passes learn, from a teacher that is worth it by then
    student_every: int = 2
    rows: int = 128
    pieces: int = 2
    control_steps: int = 240
    control_rows: int = 128
    calibration: int = 4500  # a third of them says what to test; twice `test`, see tasks.draw_many
    delta: float = 0.005  # the share of answers that adaptive compute may lose
    test: int = 2250
    swept: int = 900  # of the test instances, for the curves
    timed: int = 300
    processes: int = 2
    device_type: str = "cpu"

    @classmethod
    def quick(cls) -> "Settings":
        """Runs every part in little more than a minute; much too short to learn the tasks."""
        return cls(steps=40, students_from=10, rows=64, control_steps=20, control_rows=64, calibration=200, test=90,
                   swept=45, timed=6, delta=0.05)


def make_model(encoder: Encoder, seed: int, device_type: str = "cpu"):
    """
    8 blocks, 4 of attention and 4 of Mamba; width 128, eight heads of 16, so that there are four levels. The weights are
    drawn on the CPU and so are the same on every device.
    """
    config = HybridConfig(sequence_len=32, vocab_size=encoder.tokenizer.get_vocab_size(), n_layer=4, n_head=8, n_kv_head=8,
                          n_embd=128, d_ref=128, top_width=128, mamba_expand=1, mamba_headdim=32, mamba_d_state=16,
                          mamba_group_width=128)
    model = build_model(config, "cpu")
    torch.manual_seed(seed)
    model.init_weights()
    return model.to(device_type)


def pieces_of(instances: list, s: Settings, step: int) -> list[tuple[int, list]]:
    """
    (number, instances) of this process's pieces of a step: instances of like length, padded of about the same size, so that
    processes wait little.
    """
    lengths, instances = zip(*sorted(((len(i.prompt) + len(i.answer), i) for i in instances), key=lambda p: -p[0]))

    def cut(most):  # into pieces of at most so many characters, padding included
        at = [0]
        for k in range(1, len(lengths)):
            if (k + 1 - at[-1]) * lengths[at[-1]] > most:
                at.append(k)
        return [*at, len(lengths)]
    most = bisect_left(range(len(lengths) * lengths[0]), True, key=lambda most: len(cut(most)) <= s.pieces + 1)
    rank, world = get_rank()
    pieces = enumerate(itertools.pairwise(cut(most)))
    return [(k, list(instances[i:j])) for k, (i, j) in pieces if (k + step) % world == rank]


def finish_step(model, optimizers) -> None:
    """Sums the gradients of all processes and steps; each piece's loss was scaled by its share of the whole batch."""
    reduce_whole(model.parameters())
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)


def mean_losses(pieces: list[tuple[float, dict]]) -> dict[str, float]:
    """Of this process's pieces of a step, if it has any, each with its share of the batch."""
    seen, names = sum(share for share, _ in pieces), pieces[0][1] if pieces else ()
    return {name: sum(share * float(losses[name]) for share, losses in pieces) / seen for name in names}


def train_model(model, encoder: Encoder, seed: int, s: Settings) -> list[dict]:
    """Everything but the controls; the losses of each step."""
    optimizers, model.compute_dtype = setup_optimizers(model, embedding_lr=0.1), get_compute_dtype(s.device_type)
    progress, history = Progress("model", s.steps), []
    for step in range(s.steps):
        set_rates(optimizers, step, s.steps, *SCHEDULE)
        instances = draw_many(seed * 1_000_003 + step, s.rows, "train")
        total, losses = sum(len(i.answer) + 1 for i in instances), []
        for k, piece in pieces_of(instances, s, step):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * s.pieces + k)
            x, y, starts = encoder.batch(piece)
            students = []
            if step >= s.students_from and step % s.student_every == 0:
                # a quarter of all rows on average, whole passes at a time
                expanding = len(x) if k == step // s.student_every % 4 else 0
                students = sample_students(model.config, len(x), x.size(1), starts - 1, generator, expanding)
            share, exit_at = int((y >= 0).sum()) / total, (y.flatten() >= 0).nonzero()[:, 0]
            losses.append((share, matryoshka_backward(model, x.to(model.device), y.to(model.device), students, share,
                                                      exit_at=exit_at)))
        finish_step(model, optimizers)
        history.append(mean_losses(losses))
        progress.step(1, " | ".join(f"{name} {v:.3f}" for name, v in history[-1].items()))
    return history


def train_controls(model, encoder: Encoder, seed: int, s: Settings) -> list[dict]:
    """Gate and predictor on the finished model; the losses of each step."""
    set_trained(model, "controls")
    model.compute_dtype = torch.float32
    _, y, _ = encoder.batch(draw_many(seed, 1000, "controls"))
    model.gate.resemble(model.lm_head.weight[by_frequency(y[y >= 0])])
    optimizers = setup_optimizers(model)
    for group in optimizers[0].param_groups:
        group["initial_lr"] = 0.01  # five times the controls' usual rate, which set_rates takes from here
    progress, history = Progress("controls", s.control_steps), []
    for step in range(s.control_steps):
        set_rates(optimizers, step, s.control_steps, *SCHEDULE)
        losses = []
        for k, piece in pieces_of(draw_many(seed * 1_000_003 + step, s.control_rows, "controls"), s, step):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * s.pieces + k)
            x, y, starts = encoder.batch(piece)
            y = at_most(ANSWER, y, generator)  # or the long answers of easy tasks would speak for all
            share = len(x) / s.control_rows
            losses.append((share, controls_backward(model, x.to(model.device), y.to(model.device), starts, generator,
                                                    tokens=y.numel(), scale=share)))
        finish_step(model, optimizers)
        history.append(mean_losses(losses))
        progress.step(1, " | ".join(f"{name} {v:.3f}" for name, v in history[-1].items()))
    return history


def at_most(n: int, y: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Targets (B, T) with no more than n random supervised tokens in a row."""
    rank = torch.rand(y.shape, generator=generator).masked_fill(y < 0, 2).argsort(1).argsort(1)
    return torch.where(rank < n, y, -1)


def train(seed: int, s: Settings, between=None) -> tuple:
    """The trained model and the histories of both phases; between(model) is called before the controls are trained."""
    encoder = Encoder(make_tokenizer())
    model = make_model(encoder, seed, s.device_type)
    announce_form(model, s.device_type)
    history = train_model(model, encoder, seed, s)
    if between:
        between(model)
    return model, history, train_controls(model, encoder, seed, s)


def _work(rank: int, world: int, meeting: str, seed: int, s: Settings, between=None):
    """One training process of several; it says so as torchrun would, in the environment."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        return train(seed, s, between)
    finally:
        torch.distributed.destroy_process_group()
        del os.environ["RANK"], os.environ["WORLD_SIZE"]


def train_in_parallel(seed: int, s: Settings, between) -> tuple:
    """`train`, with a second process doing half of each batch."""
    with tempfile.TemporaryDirectory() as folder:
        meeting, threads = f"{folder}/meeting", torch.get_num_threads()
        others = [torch.multiprocessing.get_context("spawn").Process(
            target=_work, args=(rank, s.processes, meeting, seed, s), daemon=True) for rank in range(1, s.processes)]
        for process in others:
            process.start()
        try:
            return _work(0, s.processes, meeting, seed, s, between)
        finally:
            torch.set_num_threads(threads)
            for process in others:
                process.join(10)


# ---------------------------------------------------------------------------------------------------------------------
# Judging a whole set at once. Greedy decoding gives the reference answer if and only if the likeliest token after every
# prefix of it is the right one, so one parallel pass with the same decisions judges as generating would.

class Judge:
    """A set of instances and what a policy makes of them. All tensors are on the CPU but those that the model is given."""
    PIECE = 150  # instances in a pass, of like length: padding costs as much as text, and what a cache holds is faster

    def __init__(self, model, encoder: Encoder, instances: list):
        self.model, self.instances = model, instances
        self.x, self.y, self.starts = encoder.batch(instances)
        self.prompts = [encoder.prompt(i) for i in instances]
        t = torch.arange(self.x.size(1))
        self.behind = t >= self.starts[:, None] - 1
        self.answer = self.y >= 0
        self.ends = len(t) - self.answer.flip(1).int().argmax(1)  # how many tokens a text has
        self.difficulty = {d: torch.tensor([i.difficulty == d for i in instances]) for d in DIFFICULTIES}

    @torch.no_grad()
    def __call__(self, widths=None, depth: int | torch.Tensor | None = None, control=None, extra: float = 0.0) -> dict:
        """
        widths: see GPT.hidden. depth: of the tokens that generate, a number or (B, T). control: makes the Controls that
        decide both, given the tokens of a pass (some rows, T). extra: FLOPs per token and exit point of a score that is not
        the gate's. Returns 'right' (n,) bool, 'flops' and 'full_flops' of the generating passes (n,), 'depth' (B, T) and
        'widths' as planned (n, n_block).
        """
        (n, T), c = self.x.shape, self.model.config
        out = {"right": torch.empty(n, dtype=torch.bool), "depth": torch.full((n, T), c.n_block),
               "widths": torch.empty(n, c.n_block, dtype=torch.long), "flops": torch.empty(n, dtype=torch.float64),
               "full_flops": torch.empty(n, dtype=torch.float64)}
        if not isinstance(widths, torch.Tensor):
            widths = torch.tensor(self.model.resolve_widths(widths)).expand(n, -1)
        depth = torch.as_tensor(c.n_block if depth is None else depth).expand(n, T)

        def judge(rows, t):
            for name, value in self._pass(rows, t, widths[rows], depth[rows, :t], control, extra).items():
                if name == "depth":
                    out[name][rows, :t] = value
                else:
                    out[name][rows] = value
        self.in_pieces(judge)
        return out

    def in_pieces(self, f) -> list:
        """
        f(rows, t) of each piece of the set: the numbers of its instances, whose texts end by position t; on a CPU in as
        many threads as torch has.
        """
        def run(rows):
            with torch.no_grad():  # for this thread
                return f(rows, int(self.ends[rows].max()))
        pieces, threads = self.ends.argsort(stable=True).split(self.PIECE), torch.get_num_threads()
        if self.model.device.type != "cpu":
            return [run(rows) for rows in pieces]
        try:  # a pass this small gains little from two threads inside
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                return list(pool.map(run, pieces))
        finally:
            torch.set_num_threads(threads)

    def _pass(self, rows, t, widths, depth, control, extra) -> dict:
        """`__call__` for some of the instances, whose texts end by position t."""
        model, n_block = self.model, self.model.config.n_block
        x, y, behind, at = (tensor[rows, :t] for tensor in (self.x, self.y, self.behind, self.answer))
        row, place = at.nonzero(as_tuple=True)
        given = x.to(model.device)
        if control is not None:
            control = control(given)
            h, widths = control.parallel(given, [self.prompts[r] for r in rows.tolist()], behind)
            exits, flops = control.exits, control.flops(at, extra or None)
        else:
            exits = torch.where(behind, depth, n_block)
            h = model.hidden(given, widths, exits)
            flops = token_flops(model, exits[at], widths[row], place + 1)
        right = ((model.logits(h).argmax(-1).cpu() == y) | ~at).all(1)
        full = token_flops(model, torch.full_like(row, n_block), torch.full_like(widths[row], model.config.top_width),
                           place + 1)
        each = torch.zeros(2, len(rows), dtype=torch.float64).index_add_(1, row, torch.stack((flops, full)))
        return {"right": right, "depth": exits, "widths": widths, "flops": each[0], "full_flops": each[1]}

    def summary(self, result: dict) -> dict:
        """Exact match overall and by difficulty, and the share of full compute spent."""
        right = result["right"].float()
        return {"all": float(right.mean()), **{d: float(right[at].mean()) for d, at in self.difficulty.items()},
                "flops": float(result["flops"].sum() / result["full_flops"].sum())}


def softmax_score(model):
    """The likeliest token's probability, by the model's own head at each exit point."""
    c = model.config
    return lambda i, x: model.logits(norm(x, c.d_ref, c.norm_eps)).softmax(-1).amax(-1)


def change_score(model, idx):
    """How little the state changed since the exit point before (the embedding, at the first): 1 / (1 + relative change)."""
    c = model.config
    before = {}

    def score(i, x):
        last = before.get("x")
        if last is None or last[0] >= i:
            last = 0, norm(model.embed(model.transformer.wte, idx), c.d_ref, c.norm_eps)
        before["x"] = i, x
        return 1 / (1 + (x - last[1]).norm(dim=-1) / last[1].norm(dim=-1))
    return score


# ---------------------------------------------------------------------------------------------------------------------
# One seed

def calibrate_answers(tuning: Judge, judge: Judge, delta: float) -> tuple[dict, torch.Tensor]:
    """
    The evidence as a checkpoint carries it, and the losses (see confidence_probe.calibrate). The settings to test and their
    order come from `tuning`, instances of their own. Risk: the share of instances that full compute answers right and
    adaptive compute does not.
    """
    model = judge.model
    prices = calibrate_prices(model, tuning.prompts, budget_grid(model))

    def run(judge, full, budget, threshold):
        at = calibrated_thresholds(threshold, model.config)
        result = judge(control=lambda _: Controls(model, budget, **at, calibration={"prices": prices}))
        return (full & ~result["right"]).float(), float(result["flops"].sum())
    full = [j()["right"] for j in (tuning, judge)]
    path = tune(model, lambda *setting: run(tuning, full[0], *setting), 3 * delta)
    evidence, losses = calibrate(lambda *setting: run(judge, full[1], *setting)[0], delta, EPSILON, path)
    risk = "answers that full compute gets right and adaptive compute does not"
    return evidence | {"risk": risk, "prices": prices}, losses


def resampled_promise(losses: torch.Tensor, delta: float, trials: int = 200, n: int = 1200) -> dict:
    """
    Does calibration keep its promise? Calibrates on n instances drawn anew from all of `losses` (thresholds, instances),
    whose means are then the true risks; counts the trials in which the chosen threshold's exceeds delta.
    """
    true, g, failures = losses.mean(1), torch.Generator().manual_seed(0), 0
    for _ in range(trials):
        at, _ = fixed_sequence(losses[:, torch.randint(losses.size(1), (n,), generator=g)], delta, EPSILON)
        failures += at >= 0 and bool(true[at] > delta)
    return {"trials": trials, "sequences": n, "failures": int(failures), "allowed": 16}


@torch.no_grad()
def examine_gate(judge: Judge, budget: float, prices: list) -> dict:
    """Brier score, base rate's, loss, calibration curve and error, confusion: at every exit point of every answer token."""
    model = judge.model

    def look(rows, t):
        behind, answer = judge.behind[rows, :t], judge.answer[rows, :t]
        x, y = (tensor[rows, :t].to(model.device) for tensor in (judge.x, judge.y))
        at = answer.flatten().nonzero()[:, 0]
        shadow = Shadow(at)
        full = model.hidden(x).flatten(0, 1)[shadow.there(x.device)]
        prompts = [judge.prompts[r] for r in rows.tolist()]
        Controls(model, budget, 1.0, 0.0, {"prices": prices}).parallel(x, prompts, behind, shadow)
        loss, seen = gate_loss(model, shadow, full, y.flatten()[shadow.there(x.device)])
        sure, label = (seen[name].cpu()[seen["here"]] for name in ("confidence", "label"))
        return loss.cpu() * seen["pairs"], sure, label
    losses, sure, label = zip(*judge.in_pieces(look))
    sure, label = torch.cat(sure), torch.cat(label)
    loss, rate = sum(losses) / len(label), float(label.mean())
    bins = [(sure >= i / 15) & (sure < (i + 1) / 15 + (i == 14)) for i in range(15)]
    curve = [(float(sure[b].mean()), float(label[b].mean()), int(b.sum())) for b in bins if b.any()]
    said = sure > 0.5
    return {"loss": float(loss), "brier": float((sure - label).square().mean()), "base_brier": rate * (1 - rate),
            "rate": rate, "curve": curve,
            "ece": sum(abs(c - a) * n for c, a, n in curve) / len(sure),
            "confusion": {"leave, and should": int((said & (label == 1)).sum()),
                          "leave, but should not": int((said & (label == 0)).sum()),
                          "stay, but could leave": int((~said & (label == 1)).sum()),
                          "stay, and should": int((~said & (label == 0)).sum())}}


def generate_all(engine: Engine, judge: Judge, encoder: Encoder, **options) -> tuple[list[str], list[Trace]]:
    """Greedy answers by decoding, in batches of like length that compiled blocks take, and their traces."""
    by_length = sorted(range(len(judge.prompts)), key=lambda r: len(judge.prompts[r]))
    answers, traces = ([None] * len(by_length) for _ in range(2))
    for i in range(0, len(by_length), MAX_ROWS):
        some = by_length[i:i + MAX_ROWS]
        out = engine.answers([judge.prompts[r] for r in some], 12, temperature=0, stop=(encoder.end,), **options)
        for r, ids, trace in zip(some, out, engine.traces, strict=True):
            answers[r], traces[r] = encoder.tokenizer.decode(ids), trace
    return answers, traces


def spent(judge: Judge, traces: list[Trace]) -> dict:
    """Shares of full compute: of the generating passes, and of prompt and answer together."""
    totals = {}
    for trace in traces:
        for k, v in trace.flops(judge.model).items():
            totals[k] = totals.get(k, 0.0) + v
    return {"generated": totals["generated"] / totals["full_generated"],
            "all": (totals["generated"] + totals["prompt"]) / (totals["full_generated"] + totals["full_prompt"])}


def wall_clock(engine: Engine, judge: Judge, encoder: Encoder, n: int) -> dict:
    """
    Batch 1, full and adaptive in turns of 15 answers, so that each finds the caches as its users would: mean milliseconds of
    an answer of one token, and of what a whole answer takes beyond that; and full over adaptive, of the whole answers and of
    what lies behind the first token; of the whole answers with one thread, too.
    """
    wall, threads = time_answers(engine, judge, encoder, n), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return wall | {"one_thread": time_answers(engine, judge, encoder, n)["whole_speedup"]}
    finally:
        torch.set_num_threads(threads)


def time_answers(engine: Engine, judge: Judge, encoder: Encoder, n: int) -> dict:
    """`wall_clock` with torch's present number of threads."""
    times = {(mode, most): [] for most in (1, 12) for mode in (None, "auto")}
    prompts = [judge.prompts[(r * 7) % len(judge.prompts)] for r in range(n)]
    for r in range(0, n, 15):
        for (mode, most), taken in times.items():
            for k, prompt in enumerate((prompts[r - 1], *prompts[r:r + 15])):
                start = time.perf_counter()
                list(engine.tokens(prompt, most, mode=mode, temperature=0, stop=(encoder.end,)))
                if k:  # the first one finds the caches as the other mode has left them
                    taken.append(time.perf_counter() - start)
    ms = {mode or "full": [1e3 * statistics.mean(times[mode, most]) for most in (1, 12)] for mode in (None, "auto")}
    (first, full), (first_auto, auto) = ms.values()
    return {"first_ms": {"full": first, "auto": first_auto}, "rest_ms": {"full": full - first, "auto": auto - first_auto},
            "speedup": (full - first) / (auto - first_auto), "whole_speedup": full / auto}


def static_grid(judge: Judge) -> dict:
    """Every uniform width at full depth, every exit depth at full width, and both together."""
    c = judge.model.config
    out = {"width": {}, "depth": {}, "both": {}}
    for w in c.levels:
        for d in (*c.exit_points, c.n_block):
            kind = "depth" if w == c.top_width else "width" if d == c.n_block else "both"
            out[kind][f"{w}@{d}"] = judge.summary(judge(w, d))
    return out


def curves(judge: Judge, calibration: dict) -> dict:
    """
    Accuracy against FLOPs as the threshold moves, for the gate and for what it must beat, all at the predictor's widths;
    and exits drawn at random with the gate's own frequencies of depth.
    """
    model, c = judge.model, judge.model.config
    head = 2 * c.n_embd * c.vocab_size

    def controls(t, score=lambda _: None):
        return lambda x: Controls(model, calibration["budget"], t, 0.0, calibration, score(x))

    def sweep(score, extra, thresholds):
        return [judge.summary(judge(control=controls(t, score), extra=extra)) | {"threshold": t} for t in thresholds]
    out, g = {"gate": [], "random": []}, torch.Generator().manual_seed(0)
    for t in THRESHOLDS[::2]:
        result = judge(control=controls(t))
        out["gate"].append(judge.summary(result) | {"threshold": t})
        depths = result["depth"][judge.answer]
        drawn = torch.full_like(judge.x, c.n_block)
        drawn[judge.answer] = depths[torch.randint(len(depths), (len(depths),), generator=g)]
        out["random"].append(judge.summary(judge(result["widths"], drawn)) | {"threshold": t})
    out["softmax"] = sweep(lambda _: softmax_score(model), head, (1.0, 0.9999, 0.999, 0.99, 0.97, 0.9, 0.8, 0.65, 0.5))
    out["change"] = sweep(lambda x: change_score(model, x), 3 * c.n_embd, [i / 20 for i in range(18, 2, -2)])
    return out


def run_seed(seed: int, s: Settings, folder: Path) -> dict:
    """Trains and measures one seed; all that the report needs. The model is written to `folder`."""
    started = time.perf_counter()
    encoder, first = Encoder(make_tokenizer()), {}
    instances = draw_many(seed, s.test, "test")

    def between(model):
        first.update(examine_gate(Judge(model, encoder, instances), 1.0, []))
    model, history, control_history = (train_in_parallel if s.processes > 1 else train)(seed, s, between)
    trained = time.perf_counter() - started
    result = measure(model, encoder, seed, s, first, folder) | {"history": history, "control_history": control_history}
    return result | {"seconds": {"training": trained, "all": time.perf_counter() - started}}


def measure(model, encoder: Encoder, seed: int, s: Settings, first: dict, folder: Path) -> dict:
    """Calibrates a trained model and measures it on held-out instances. first: examine_gate before the gate was trained."""
    c = model.config
    print0(f"  {model.num_params()['total']:,} parameters, levels {c.levels}, exits after {c.exit_points} of {c.n_block}")
    instances = draw_many(seed, s.test, "test")
    test, swept = Judge(model, encoder, instances), Judge(model, encoder, instances[:s.swept])
    prepare_inference(model, s.device_type, torch.float32)
    held_out = draw_many(seed, s.calibration, "calibration")
    n = s.calibration // 3
    calibration, losses = calibrate_answers(*(Judge(model, encoder, part) for part in (held_out[:n], held_out[n:])), s.delta)
    budget, prices = calibration["budget"] or 1.0, calibration["prices"]
    calibration["budget"] = budget  # where nothing passed, full compute
    print0(f"  budget {budget:.2f} of full compute, exit threshold {calibration['exit_threshold']}")
    promise = resampled_promise(losses, s.delta)
    model.config = c = replace(c, **calibrated_thresholds(calibration["exit_threshold"], c))
    save_export(folder, model, encoder.tokenizer, {"tag": "tiny", "provenance": {"trained": "tiny_experiment", "seed": seed},
                                                   "calibration": calibration})
    engine = Engine(model, encoder.tokenizer, calibration)
    answers = {}
    for name, options in {"full": {}, **{m: {"mode": m} for m in c.distinct_modes}, "adaptive": {"mode": "auto"}}.items():
        whole = c.distinct_modes.get(name) == c.top_width  # the widest mode is full compute
        answers[name] = answers["full"] if whole else generate_all(engine, test, encoder, **options)
    gate = examine_gate(test, budget, prices)
    result = {"seed": seed, "config": str(c), "budget": budget, "calibration": calibration, "promise": promise,
              "gate_first": first, "gate": gate, "exact_match": {}, "static": static_grid(swept),
              "curves": curves(swept, calibration)}
    for name, (texts, _) in answers.items():
        right = torch.tensor([a == i.answer for a, i in zip(texts, test.instances)]).float()
        result["exact_match"][name] = {"all": float(right.mean()),
                                       **{d: float(right[at].mean()) for d, at in test.difficulty.items()}}
        by_task = {}
        for i, ok in zip(test.instances, right.tolist()):
            by_task.setdefault(i.task, []).append(ok)
        result["exact_match"][name]["tasks"] = {k: statistics.mean(v) for k, v in sorted(by_task.items())}
    texts, traces = answers["adaptive"]
    tokens = {d: [depth for trace, text, i in zip(traces, texts, test.instances) if i.difficulty == d
                  for depth, _ in trace.steps[:len(text)]] for d in DIFFICULTIES}  # a character is a token; not the end
    depths = [d for v in tokens.values() for d in v]
    widths = {d: [statistics.mean(t.widths) for t, i in zip(traces, test.instances) if i.difficulty == d]
              for d in DIFFICULTIES}
    result |= {
        "exit_rate": statistics.mean(d <= 0.75 * c.n_block for d in depths),
        "spent": spent(test, traces),
        "spent_modes": {name: spent(test, t) for name, (_, t) in answers.items()},
        "depth_counts": {d: {p: v.count(p) for p in (*c.exit_points, c.n_block)} for d, v in tokens.items()},
        "mean_depth": {d: statistics.mean(v) for d, v in tokens.items()},
        "mean_width": {d: statistics.mean(v) for d, v in widths.items()},
        "hard_minus_easy": {"depth": difference(tokens["hard"], tokens["easy"]),
                            "width": difference(widths["hard"], widths["easy"])},
        "levels": {d: [statistics.mean(t.widths[b] for t, i in zip(traces, test.instances) if i.difficulty == d)
                       for b in range(c.n_block)] for d in DIFFICULTIES},
        "examples": examples(test, texts, traces),
        "wall": wall_clock(engine, test, encoder, s.timed)}
    return result


def difference(a: list[float], b: list[float]) -> dict:
    """Mean of a minus mean of b, and the lower end of its one-sided 95 % interval (normal approximation)."""
    a, b = (torch.tensor(v, dtype=torch.float64) for v in (a, b))
    error = math.sqrt(float(a.var()) / len(a) + float(b.var()) / len(b))
    return {"mean": float(a.mean() - b.mean()), "low": float(a.mean() - b.mean()) - 1.645 * error}


def examples(judge: Judge, texts: list[str], traces: list[Trace]) -> list[dict]:
    """An easy and a hard answer, token by token."""
    out = []
    for d in ("easy", "hard"):
        r = next((r for r, i in enumerate(judge.instances) if i.difficulty == d and texts[r] == i.answer), None)
        if r is not None:
            out.append({"prompt": judge.instances[r].prompt, "answer": texts[r], "difficulty": d,
                        "widths": list(traces[r].widths), "depths": [depth for depth, _ in traces[r].steps]})
    return out
