"""
Lossless decoding against plain decoding, for scripts/bench.py: the same prompts in turns, greedy and sampled, at batch 1
and 8; what each draft brings and what its costs allow in theory; and the proof that no token differs.

Prompts are pieces of held-out text. Greedy text of a small model soon repeats itself, and what repeats is easily drafted:
outputs that loop are reported apart.
"""
import itertools
import random
import statistics
import time

import torch

from nanochat import checkpoint_manager as ckpt
from nanochat.common import get_base_dir
from nanochat.dataloader import DataLoader
from nanochat.dataset import prepare
from nanochat.engine import Engine, prepare_inference
from nanochat.speculative import MAX_DRAFT, Record, candidates, expected_tokens
from nanochat.training import flag
from scripts.bench_tools import machine

SAMPLING = {"greedy": {"temperature": 0.0}, "sampled": {"temperature": 0.8, "top_k": 50}}
TIE = 1e-4   # a gap between plain decoding's two likeliest logits in which rounding may decide


def loops(tokens: list[int], longest: int = 24) -> bool:
    """Whether the second half of an output repeats with a period of at most `longest` tokens."""
    half = len(tokens) // 2
    return any(all(tokens[i] == tokens[i - p] for i in range(half, len(tokens)))
               for p in range(1, min(longest, half) + 1))


def held_out(tokenizer, data, T: int, n: int, length: int) -> list[list[int]]:
    """n prompts of `length` tokens."""
    x, _ = next(iter(DataLoader(tokenizer, data, "val", n, T, device="cpu")))[:2]
    return [[tokenizer.get_bos_token_id(), *row[1:length]] for row in x.tolist()]


def timed(engine, prompts, n, **options) -> tuple[list[list[int]], float]:
    """Answers, and the seconds from the first token on: prompts cost the same either way."""
    out, start = [[] for _ in prompts], None
    for pairs in engine.stream(prompts, n, **options):
        start = start or time.perf_counter()
        for r, token in pairs:
            out[r].append(token)
    return out, time.perf_counter() - start


def gap(model, ids: list[int]) -> float:
    """Between the two likeliest next tokens' logits."""
    with torch.inference_mode():
        top = model(torch.tensor([ids], device=model.device))[0, -1].topk(2).values
    return float(top[0] - top[1])


def compare(model, prompts, got, want) -> tuple[int, list[float]]:
    """Outputs that differ although plain decoding was sure, and the gaps where it was not."""
    wrong, ties = 0, []
    for prompt, a, b in zip(prompts, got, want):
        at = next((i for i, (x, y) in enumerate(itertools.zip_longest(a, b)) if x != y), None)
        if at is not None:
            ties.append(gap(model, prompt + b[:at]))
            wrong += ties[-1] >= TIE
    return wrong, [t for t in ties if t < TIE]


def race(engine, prompts, batch: int, n: int, sampling: str, mode: str) -> dict:
    """Both ways in turns over all prompts, after a first pass over some of them that is not counted."""
    options, rows, ties, wrong = SAMPLING[sampling], [], [], 0
    groups = [prompts[i:i + batch] for i in range(0, len(prompts), batch)]
    for group in groups[:1 if batch > 1 else 3]:  # learns the costs and what is accepted
        timed(engine, group, n, lossless=True, mode=mode, seed=99, **options)
    for i, group in enumerate(groups):
        def run(lossless, seed=i, group=group):
            return timed(engine, group, n, seed=seed, **options, **({"lossless": True, "mode": mode} if lossless else {}))
        if i % 2:
            want, plain = run(False)
        got, fast = run(True)
        traces, rollback = engine.traces, engine.speculation.seconds["rollback"]
        rounds = [r for t in traces for r in t.rounds]
        if not i % 2:
            want, plain = run(False)
        if sampling == "greedy":
            w, t = compare(engine.model, group, got, want)
            wrong, ties = wrong + w, ties + t
        tokens, usual = sum(map(len, got)) - len(got), sum(map(len, want)) - len(want)
        rows.append({"loops": sum(map(loops, got)) * 2 > len(got), "plain": plain / usual, "fast": fast / tokens,
                     "rollback": rollback / tokens,
                     "drafted": sum(r.drafted for r in rounds), "accepted": sum(r.accepted for r in rounds),
                     "rounds": sum(r.drafted > 0 for r in rounds), "tokens": tokens,
                     "paused": sum(bool(t.notes) for t in traces)})

    def summary(rows):
        drafted, rounds = (sum(r[k] for r in rows) for k in ("drafted", "rounds"))
        accepted = sum(r["accepted"] for r in rows)
        return {"outputs": len(rows) * batch, "speedup": statistics.median(r["plain"] / r["fast"] for r in rows),
                "speedup_without_rollback": statistics.median(r["plain"] / (r["fast"] - r["rollback"]) for r in rows),
                "plain_tok_per_s": batch_rate(rows, "plain", batch), "tok_per_s": batch_rate(rows, "fast", batch),
                "drafted_tokens_kept": accepted / max(1, drafted), "tokens_per_check": 1 + accepted / max(1, rounds),
                "paused": sum(r["paused"] for r in rows)}
    out = {"all": summary(rows), "mismatches": wrong, "near_ties": ties}
    for name, some in (("loops", True), ("no_loops", False)):
        if any(r["loops"] == some for r in rows):
            out[name] = summary([r for r in rows if r["loops"] == some])
    return out


def batch_rate(rows, key, batch) -> float:
    return 1 / statistics.median(r[key] for r in rows)


def draft_table(engine, prompts, n: int, k: int, mode: str) -> list[dict]:
    """Every draft of one length at batch 1, greedy: acceptance, its costs over a plain token's, and what they allow."""
    out = []
    for draft in candidates(engine.model.config, mode):
        record, ratios, accepted, tried = Record(engine.model), [], 0, 0
        engine.record = record
        for prompt in prompts:
            plain, fast = (timed(engine, [prompt], n, temperature=0, **o)[1] for o in
                           ({}, {"lossless": True, "mode": draft.width, "depth": draft.depth, "draft": k}))
            record.timed(record.plain, 1, plain / (n - 1))
            ratios.append(plain / fast)
            rounds = [r for r in engine.traces[0].rounds if r.draft]
            accepted += sum(r.accepted for r in rounds)
            tried += sum(min(r.accepted + 1, r.drafted) for r in rounds)
        a, cost = accepted / tried, record.draft(draft, 1) / record.plain[1]
        checks = {j: record.check(draft, 1, j + 1) / record.plain[1] for j in range(1, MAX_DRAFT + 1)}
        bound, best = max((expected_tokens(a, j) / (j * cost + checks[j]), j) for j in checks)
        out.append({"depth": draft.depth, "width": draft.width, "acceptance": a, "draft_cost": cost, "check_cost": checks[k],
                    "speedup": statistics.median(ratios),
                    "theory_at_this_length": expected_tokens(a, k) / (k * cost + checks[k]),
                    "theory": bound, "theory_length": best, "theory_if_all_right": (k + 1) / (k * cost + checks[k])})
    return out


def prove(model, tokenizer, data, sequences: int, n: int = 12) -> dict:
    """Greedy outputs of all drafts, all lengths 1 to 8, batch 1 and 8, over prompts of all kinds and lengths."""
    engine, V, limit = Engine(model, tokenizer), model.config.vocab_size, model.config.sequence_len
    rng, drafts = random.Random(0), candidates(model.config)
    text = list(itertools.chain.from_iterable(held_out(tokenizer, data, limit, 16, limit)))

    def prompt():
        length = rng.choice((1, 2, 5, 17, 40, limit // 2, limit - 8, limit - 2))  # the last ones end inside a draft
        start = rng.randrange(len(text) - limit)
        return rng.choice((text[start:start + length], [rng.randrange(V)] * length, rng.choices(range(V), k=length),
                           (text[start:start + 7] * limit)[:length]))
    done, wrong, ties, cases, start = 0, 0, [], set(), time.perf_counter()
    settings = itertools.cycle([(d, k, b) for k in range(1, MAX_DRAFT + 1) for d in drafts for b in (1, 8)])
    while done < sequences:
        draft, k, batch = next(settings)
        prompts = [prompt() for _ in range(batch)]
        plain = engine.answers(prompts, n, temperature=0)
        stop = plain[0][len(plain[0]) // 2] if done % 3 == 0 else -1
        want = [a[:a.index(stop)] if stop in a else a for a in plain]
        got = engine.answers(prompts, n, temperature=0, lossless=True, mode=draft.width, depth=draft.depth, draft=k,
                             stop=[stop])
        w, t = compare(model, prompts, got, want)
        done, wrong, ties = done + batch, wrong + w, ties + t
        cases.add((draft, k, batch))
        if len(cases) % 30 == 0:
            rate = done / (time.perf_counter() - start)
            print(f"  proof: {done:,} of {sequences:,} sequences, {wrong} differ, {len(ties)} near-ties, "
                  f"{rate:.1f}/s, ETA {max(0, sequences - done) / rate:.0f} s", flush=True)
    return {"sequences": done, "settings": len(cases), "of_settings": 2 * MAX_DRAFT * len(drafts), "mismatches": wrong,
            "near_ties": ties}


def bench_speculative(args) -> dict:
    """Every model given, the largest one last."""
    for name, least in (("max_tokens", 3), ("length", 1), ("prompts", 0), ("table", 0), ("proof", 0)):
        if getattr(args, name) < least:  # times begin behind the first token, and the last one is never drafted
            raise ValueError(f"{flag(name)} is {getattr(args, name)}; it must be at least {least}")
    if args.length > MAX_DRAFT:
        raise ValueError(f"--length {args.length} is out of range: give 1 to {MAX_DRAFT}")
    paths = args.checkpoint or sorted((get_base_dir() / "fractal_checkpoints").glob("speedrun_*_unfrozen"))[-1:]
    if not paths:
        raise ValueError(f"there is no speedrun's model in {get_base_dir()}: run `bash speedrun.sh`, or give --checkpoint")
    data, models = prepare(args.data), {}
    for path in paths:
        model, tokenizer, _, _ = ckpt.load(path, "cpu")
        prepare_inference(model, "cpu", torch.bfloat16 if args.dtype == "bfloat16" else torch.float32)
        counts = model.num_params()["total"]
        print(f"{path}: {counts:,} parameters, {args.dtype}", flush=True)
        result = models[str(path)] = {"parameters": counts}
        limit = model.config.sequence_len
        prompts = held_out(tokenizer, data, limit, max(args.prompts, 8), min(48, limit // 2))
        n = min(args.max_tokens, limit - len(prompts[0]))
        if args.prompts:
            for batch, sampling in itertools.product((1, 8), SAMPLING):
                some = prompts if batch == 8 else prompts[:args.prompts]
                engine = result.setdefault("_engine", Engine(model, tokenizer))
                found = result[f"{sampling}_b{batch}"] = race(engine, some, batch, n, sampling, args.mode)
                for kind in ("all", "no_loops", "loops"):
                    if kind in found:
                        f = found[kind]
                        print(f"  {sampling}, batch {batch}, {kind.replace('_', ' ')} ({f['outputs']} outputs): "
                              f"{f['speedup']:.2f}x ({f['speedup_without_rollback']:.2f}x without rollback), "
                              f"{f['tok_per_s']:.1f} against {f['plain_tok_per_s']:.1f} tok/s, "
                              f"{f['drafted_tokens_kept']:.0%} of the drafted tokens kept, "
                              f"{f['tokens_per_check']:.2f} tokens a check, drafting paused in {f['paused']}", flush=True)
            result.pop("_engine")
        if args.table:
            result["drafts"] = draft_table(Engine(model, tokenizer), prompts[:args.table], n, args.length, args.mode)
            for d in result["drafts"]:
                print(f"  depth {d['depth']:2d} width {d['width']:4d}: acceptance {d['acceptance']:.3f}, a draft costs "
                      f"{d['draft_cost']:.2f}, a check {d['check_cost']:.2f}: {d['speedup']:.2f}x at {args.length} tokens, "
                      f"theory {d['theory_at_this_length']:.2f}x ({d['theory_if_all_right']:.2f}x if all were right), "
                      f"best {d['theory']:.2f}x at {d['theory_length']}", flush=True)
        if args.proof:
            result["proof"] = prove(model, tokenizer, data, args.proof)
            print(f"  proof: {result['proof']}", flush=True)
    last = list(models.values())[-1]
    top = {}
    if args.prompts:
        best = {b: last[f"greedy_b{b}"] for b in (1, 8)}
        top = {f"speedup_b{b}": r["all"]["speedup"] for b, r in best.items()}
        top["acceptance"] = best[1]["all"]["drafted_tokens_kept"]
    top["mismatches"] = sum(part.get("mismatches", 0) for m in models.values() for part in m.values()
                            if isinstance(part, dict))
    return {"machine": machine("cpu"), "dtype": args.dtype, **top, "models": models}


def add_speculative(parser) -> None:
    parser.add_argument("--checkpoint", nargs="+", help="models' folders, the largest last (default: the speedrun's)")
    parser.add_argument("--data", default="embedded", help="the text whose held-out part the prompts come from, as in "
                                                           "training (default: embedded)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                        help="of the weights (default: float32)")
    parser.add_argument("--mode", default="auto", help="drafts of this mode or width only (default: auto, all of them)")
    parser.add_argument("--prompts", type=int, default=8, help="held-out prompts at batch 1; 0: no race (default: 8)")
    parser.add_argument("--max-tokens", type=int, default=96, help="tokens of an answer (default: 96)")
    parser.add_argument("--table", type=int, default=0, help="prompts for a table of every draft (default: 0, no table)")
    parser.add_argument("--length", type=int, default=4, help="tokens drafted at a time in that table (default: 4)")
    parser.add_argument("--proof", type=int, default=0,
                        help="greedy sequences to compare, over all drafts and lengths (default: 0; 1000 take minutes)")
