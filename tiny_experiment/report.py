"""
What the runs say: report.json, report.md, plots, and a verdict for each claim. A FAIL stays a FAIL.
"""
import math
import statistics
from pathlib import Path

from nanochat.checkpoint_manager import save_json
from nanochat.common import atomic_write
from tiny_experiment.tasks import DIFFICULTIES


def mean(values) -> float:
    return statistics.mean(values)


def spread(values) -> str:
    values = list(values)
    return f"{100 * mean(values):.1f}" + (f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "")


def averaged(points: list[list[dict]]) -> list[dict]:
    """Curves of several seeds, point by point (the settings are the same) -> one."""
    return [{k: mean(p[k] for p in at) for k in at[0]} for at in zip(*points, strict=True)]


def accuracy_at(curve: list[dict], flops: float) -> float | None:
    """Best accuracy that a curve reaches at this cost or less, between its points linearly; None below its cheapest."""
    points = sorted((p["flops"], p["all"]) for p in curve)
    best = None
    for (x0, y0), (x1, y1) in zip(points, [*points[1:], (math.inf, 0.0)]):
        if x0 > flops:
            break
        best = max(best or 0.0, y0)
        if x1 > flops and math.isfinite(x1):
            best = max(best, y0 + (y1 - y0) * (flops - x0) / (x1 - x0))
    return best


def static_curve(runs: list[dict], kinds: tuple[str, ...]) -> list[dict]:
    return averaged([[p for kind in kinds for p in r["static"][kind].values()] for r in runs])


def claims(runs: list[dict]) -> list[dict]:
    """Every claim with the figure that decides it, means over the seeds."""
    out = []

    def claim(text, value, ok, shown):
        out.append({"claim": text, "value": value, "pass": bool(ok), "shown": shown})

    def match(name, d):
        return 100 * mean(r["exact_match"][name][d] for r in runs)
    rate = 100 * mean(r["exit_rate"] for r in runs)
    claim("at least 71.5 % of generated tokens exit early", rate, rate >= 71.5, f"{rate:.1f} %")
    saved = 100 * (1 - mean(r["spent"]["generated"] for r in runs))
    claim("at least 37.5 % of whole-model FLOPs of generated tokens saved", saved, saved >= 37.5, f"{saved:.1f} %")
    fall = mean(r["gate_first"]["brier"] for r in runs) / mean(r["gate"]["brier"] for r in runs)
    claim("the gate's held-out Brier score falls at least 9x", fall, fall >= 9, f"{fall:.1f}x, "
          f"{mean(r['gate_first']['brier'] for r in runs):.3f} -> {mean(r['gate']['brier'] for r in runs):.4f}")
    brier, base = (mean(r["gate"][k] for r in runs) for k in ("brier", "base_brier"))
    claim("... and beats the base rate's", base / brier, brier < base, f"{brier:.4f} against {base:.4f}")
    for what in ("depth", "width"):
        low = min(r["hard_minus_easy"][what]["low"] for r in runs)
        gap = mean(r["hard_minus_easy"][what]["mean"] for r in runs)
        claim(f"hard tasks get more {what} than easy ones (95 % in every seed)", gap, low > 0,
              f"{gap:+.2f}, at least {low:+.2f}")
    loss = match("full", "all") - match("adaptive", "all")
    claim("adaptive exact match within 0.5 points of full compute", loss, loss <= 0.5, f"{-loss:+.2f} points")
    for d in DIFFICULTIES:
        loss = match("full", d) - match("adaptive", d)
        claim(f"... within 1 point on {d}", loss, loss <= 1, f"{-loss:+.2f} points")
    for d, least in zip(DIFFICULTIES, (99, 97, 85)):
        claim(f"full compute answers at least {least} % of {d}", match("full", d), match("full", d) >= least,
              f"{match('full', d):.1f} %")
    claim("beyond: at least 60 % of those FLOPs saved", saved, saved >= 60, f"{saved:.1f} %")
    wall, whole = (mean(r["wall"][k] for r in runs) for k in ("speedup", "whole_speedup"))
    claim("beyond: whole answers 1.8x faster by wall-clock at batch 1", whole, whole >= 1.8, f"{whole:.2f}x")
    claim("... generated tokens, behind the first", wall, wall >= 1.8, f"{wall:.2f}x")
    gate = averaged([r["curves"]["gate"] for r in runs])
    rivals = {name: averaged([r["curves"][name] for r in runs]) for name in ("random", "change", "softmax")}
    rivals |= {"static width": static_curve(runs, ("width",)), "static depth": static_curve(runs, ("depth",)),
               "static width and depth": static_curve(runs, ("width", "depth", "both"))}
    for name, curve in rivals.items():
        gaps = [p["all"] - other for p in gate if (other := accuracy_at(curve, p["flops"])) is not None]
        gap = 100 * mean(gaps) if gaps else math.nan
        claim(f"beyond: more accurate at equal FLOPs than {name}", gap, gaps and gap > 0, f"{gap:+.2f} points on average "
              f"over {len(gaps)} points of the curve")
    ece = mean(r["gate"]["ece"] for r in runs)
    claim("beyond: the gate's expected calibration error at most 0.03", ece, ece <= 0.03, f"{ece:.4f}")
    failures = max(r["promise"]["failures"] for r in runs)
    claim("calibration keeps its promise in 200 resampled trials (at most 16 failures)", failures, failures <= 16,
          f"{failures} failures")
    return out


def summarize(runs: list[dict], settings: dict, quick: bool) -> dict:
    """report.json."""
    names = list(runs[0]["exact_match"])
    return {
        "quick": quick, "settings": settings, "seeds": [r["seed"] for r in runs],
        "exact_match": {n: {d: mean(r["exact_match"][n][d] for r in runs) for d in ("all", *DIFFICULTIES)} for n in names},
        "exit_rate": mean(r["exit_rate"] for r in runs),
        "flops_saved": 1 - mean(r["spent"]["generated"] for r in runs),
        "flops_saved_prompt_and_answer": 1 - mean(r["spent"]["all"] for r in runs),
        "wall_speedup": mean(r["wall"]["speedup"] for r in runs),
        "wall_speedup_prompt_and_answer": mean(r["wall"]["whole_speedup"] for r in runs),
        "gate_loss": [mean(r["gate_first"]["loss"] for r in runs), mean(r["gate"]["loss"] for r in runs)],
        "ece": mean(r["gate"]["ece"] for r in runs),
        "mean_width": {d: mean(r["mean_width"][d] for r in runs) for d in DIFFICULTIES},
        "mean_depth": {d: mean(r["mean_depth"][d] for r in runs) for d in DIFFICULTIES},
        "claims": claims(runs), "runs": runs}


def markdown(report: dict) -> str:
    """report.md."""
    runs, lines = report["runs"], ["# The tiny experiment", ""]
    if report["quick"]:
        lines += ["A quick run: every part has run, but far too short to learn the tasks. Its verdicts mean nothing.", ""]
    lines += [f"{len(runs)} seed{'s' if len(runs) > 1 else ''}, {mean(r['seconds']['all'] for r in runs):.0f} s each on "
              f"average ({mean(r['seconds']['training'] for r in runs):.0f} s of training). {runs[0]['config']}", "",
              "| claim | | figure |", "|---|---|---|"]
    lines += [f"| {c['claim']} | {'PASS' if c['pass'] else '**FAIL**'} | {c['shown']} |" for c in report["claims"]]
    lines += ["", "## Exact match by generating, %", "",
              "| compute | all | easy | medium | hard | FLOPs of generated tokens |",
              "|---|---|---|---|---|---|"]
    for name in report["exact_match"]:
        cells = [spread(r["exact_match"][name][d] for r in runs) for d in ("all", *DIFFICULTIES)]
        cost = 100 * mean(r["spent_modes"][name]["generated"] for r in runs)
        lines.append(f"| {name} | {' | '.join(cells)} | {cost:.1f} % |")
    lines += ["", "## What adaptive compute does", "", "| | easy | medium | hard |", "|---|---|---|---|"]
    for what in ("mean_depth", "mean_width"):
        lines.append(f"| {what.replace('_', ' ')} | " + " | ".join(f"{report[what][d]:.2f}" for d in DIFFICULTIES) + " |")
    wall = [mean(r["wall"][part][k] for r in runs) for k in ("full", "auto") for part in ("first_ms", "rest_ms")]
    lines += ["", f"FLOPs saved on generated tokens {100 * report['flops_saved']:.1f} %, on prompt and answer together "
              f"{100 * report['flops_saved_prompt_and_answer']:.1f} %. At batch 1 an answer of one token takes "
              f"{wall[0]:.2f} ms and the other tokens {wall[1]:.2f} more, adaptive {wall[2]:.2f} and {wall[3]:.2f} ms. With "
              f"one thread whole answers are {mean(r['wall']['one_thread'] for r in runs):.2f}x as fast adaptively.", "",
              "## The gate", "",
              "| seed | loss | Brier | base rate's | ECE | budget | threshold | observed risk | p |",
              "|---|---|---|---|---|---|---|---|---|"]
    for r in runs:
        g, first, c = r["gate"], r["gate_first"], r["calibration"]
        at = max(0, len(c["p_values"]) - 1 - (c["p_values"][-1] > c["epsilon"]))
        lines.append(f"| {r['seed']} | {first['loss']:.3f} -> {g['loss']:.3f} | {first['brier']:.3f} -> {g['brier']:.4f} | "
                     f"{g['base_brier']:.4f} | {g['ece']:.4f} | {r['budget']:.2f} | "
                     f"{c['exit_threshold'] or 'none passed'} | "
                     f"{100 * c['observed'][at]:.2f} % | {c['p_values'][at]:.3f} |")
    lines += ["", f"Calibrated so that with {100 * (1 - runs[0]['calibration']['epsilon']):.0f} % confidence at most "
              f"{100 * runs[0]['calibration']['delta']:g} % of the answers that full compute gets right are lost.", "",
              "| confusion, all seeds | tokens at exit points |", "|---|---|"]
    lines += [f"| {k} | {sum(r['gate']['confusion'][k] for r in runs)} |" for k in runs[0]["gate"]["confusion"]]
    for name in ("accuracy_flops", "controls", "traces"):
        lines += ["", f"![{name}]({name}.png)"]
    lines.append("")
    return "\n".join(lines)


def plot(report: dict, folder: Path) -> None:
    import matplotlib  # slow to import
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    runs = report["runs"]
    fig, ax = plt.subplots(figsize=(7, 4.5))
    for name, label in (("gate", "gate (ours)"), ("softmax", "softmax confidence"), ("change", "hidden-state change"),
                        ("random", "random exits, same rate")):
        points = sorted(averaged([r["curves"][name] for r in runs]), key=lambda p: p["flops"])
        ax.plot([100 * p["flops"] for p in points], [100 * p["all"] for p in points], marker="o", ms=3, label=label)
    for kind, marker in (("width", "s"), ("depth", "^"), ("both", "x")):
        points = static_curve(runs, (kind,))
        ax.scatter([100 * p["flops"] for p in points], [100 * p["all"] for p in points], marker=marker, s=25,
                   color="grey", label=f"static {kind}")
    ax.scatter(100 * (1 - report["flops_saved"]), 100 * report["exact_match"]["adaptive"]["all"], marker="*", s=160,
               color="black", zorder=5, label="calibrated")
    ax.set(xlabel="FLOPs of generated tokens, % of full", ylabel="exact match, %",
           title="Accuracy against compute, held out")
    ax.legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(folder / "accuracy_flops.png", dpi=130)
    plt.close(fig)

    fig, axes = plt.subplots(1, 4, figsize=(15, 3.6))
    places = list(runs[0]["depth_counts"]["easy"])
    for j, d in enumerate(DIFFICULTIES):
        counts = [sum(r["depth_counts"][d][p] for r in runs) for p in places]
        axes[0].bar([i + 0.27 * (j - 1) for i in range(len(places))], [100 * n / sum(counts) for n in counts], 0.26, label=d)
    axes[0].set_xticks(range(len(places)), places)
    axes[0].set(title="exit depth of generated tokens", xlabel="blocks", ylabel="%")
    axes[0].legend(fontsize=7)
    levels = [[mean(r["levels"][d][b] for r in runs) for b in range(len(runs[0]["levels"][d]))] for d in DIFFICULTIES]
    image = axes[1].imshow(levels, aspect="auto", cmap="viridis")
    axes[1].set_yticks(range(3), DIFFICULTIES)
    axes[1].set(title="mean width by block", xlabel="block")
    fig.colorbar(image, ax=axes[1])
    for r in runs:
        axes[2].plot([h["gate"] for h in r["control_history"]], lw=0.8, label=f"seed {r['seed']}")
    axes[2].set(title="gate loss", xlabel="step", yscale="log")
    axes[2].legend(fontsize=7)
    for r in runs:
        axes[3].plot(*zip(*[(c, a) for c, a, _ in r["gate"]["curve"]]), marker="o", ms=3, lw=0.8)
    axes[3].plot([0, 1], [0, 1], color="grey", lw=0.8)
    axes[3].set(title="gate calibration, held out", xlabel="confidence", ylabel="share that could leave")
    fig.tight_layout()
    fig.savefig(folder / "controls.png", dpi=130)
    plt.close(fig)

    shown = runs[0]["examples"]
    fig, axes = plt.subplots(max(1, len(shown)), 1, figsize=(9, 1.7 * max(1, len(shown))), squeeze=False)
    for ax, e in zip(axes[:, 0], shown):
        tokens = [*e["answer"], "end"][:len(e["depths"])]
        ax.bar(range(len(tokens)), e["depths"], color=plt.cm.viridis([d / max(places) for d in e["depths"]]))
        ax.set_xticks(range(len(tokens)), tokens)
        ax.set(title=f"{e['difficulty']}: {e['prompt']}  (widths {e['widths']})", ylim=(0, max(places)), ylabel="depth")
        ax.title.set_fontsize(8)
    fig.tight_layout()
    fig.savefig(folder / "traces.png", dpi=130)
    plt.close(fig)


def write(runs: list[dict], settings: dict, quick: bool, folder: Path) -> dict:
    """Writes everything into `folder` and returns the report."""
    folder.mkdir(parents=True, exist_ok=True)
    report = summarize(runs, settings, quick)
    save_json(report, folder / "report.json")
    with atomic_write(folder / "report.md", "w") as f:
        f.write(markdown(report))
    plot(report, folder)
    return report
