"""
The speedrun's final table, and speedrun.json and speedrun.png in NANOCHAT_BASE_DIR. speedrun.sh calls it with the
folders it made.
"""
import argparse
import json
from pathlib import Path

import matplotlib

from nanochat import checkpoint_manager as ckpt
from nanochat.common import atomic_write, cli, get_base_dir
from nanochat.monitor import read_metrics

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt

MODES = ("ghost", "whisper", "normal", "think")
LABELS = {"base": "base", "surgery": "hybrid after surgery", "stage1": "hybrid after stage 1",
          "unfrozen": "hybrid after unfrozen phase"}


def validations(folder: Path) -> list[dict]:
    """The evaluations that a training run logged, one entry per step."""
    return [e for e in read_metrics(folder) if "val_bpb" in e]


def plot(path: Path, folders: dict[str, Path], evals: dict[str, dict]) -> None:
    """Held-out bits per byte over training, and against compute."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    base = validations(folders["base"])
    left.plot([e["step"] for e in base], [e["val_bpb"] for e in base], "k-o", markersize=3, label="base")
    colors = dict(zip(MODES, plt.cm.viridis([0.0, 0.3, 0.6, 0.85])))
    start = base[-1]["step"]
    for name in ("stage1", "unfrozen"):
        entries = validations(folders[name])
        for mode in MODES:
            left.plot([start + e["step"] for e in entries], [e[f"val_{mode}"] for e in entries], "-o", markersize=3,
                      color=colors[mode], label=mode if name == "stage1" else None)
        left.axvline(start, color="0.7", linewidth=0.8)
        left.text(start, left.get_ylim()[1], f" {name}", va="top", fontsize=8, color="0.4")
        start += entries[-1]["step"]
    left.set(xlabel="training step", ylabel="held-out bits per byte")
    left.legend(fontsize=8)
    for name in ("surgery", "stage1", "unfrozen"):
        rows = [evals[name]["modes"][m] for m in MODES]
        right.plot([100 * r["flops_share"] for r in rows], [r["bpb"] for r in rows], "-o", markersize=4, label=LABELS[name])
    right.axhline(evals["base"]["modes"]["think"]["bpb"], color="k", linewidth=0.8, linestyle=":", label="base")
    right.set(xlabel="FLOPs of the whole model, % of full", ylabel="held-out bits per byte")
    right.legend(fontsize=8)
    fig.tight_layout()
    with atomic_write(path) as f:
        fig.savefig(f, format="png", dpi=120)
    plt.close(fig)


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description="Print a speedrun's table; write speedrun.json and speedrun.png.")
    p.add_argument("--work", required=True, help="speedrun.sh's folder of evaluations (*.json) and times (*.seconds)")
    for name in ("base", "hybrid", "stage1", "unfrozen"):
        p.add_argument(f"--{name}", required=True, help=f"folder of the {name} checkpoint")
    args = p.parse_args(argv)

    work = Path(args.work)
    evals = {name: ckpt.load_json(work / f"{name}.json") for name in ("base", "surgery", "stage1", "unfrozen")}
    base_meta = ckpt.load_json(Path(args.base) / f"meta_{ckpt.last_step(args.base):06d}.json")
    exports = {name: ckpt.load_json(Path(getattr(args, name)) / "config.json") for name in ("hybrid", "stage1", "unfrozen")}
    times = {f.stem: sum(map(int, f.read_text().split())) for f in sorted(work.glob("*.seconds"))}
    delta = exports["hybrid"]["proof"]["max_delta_logit"]
    final = evals["unfrozen"]["modes"]

    def bpb(name, mode):
        return evals[name]["modes"][mode]["bpb"]
    report = {
        "seconds": sum(times.values()), "stage_seconds": times, "delta_logit": delta,
        "bpb": {"step0": base_meta["figures"]["first_bpb"], "base": bpb("base", "think"), "surgery": bpb("surgery", "think"),
                "stage1": {m: bpb("stage1", m) for m in MODES}, **{m: bpb("unfrozen", m) for m in MODES}},
        "params": evals["unfrozen"]["params"], "base_params": evals["base"]["params"]["total"],
        "flops_share": {m: final[m]["flops_share"] for m in MODES},
        "dynamic_share": {m: final[m]["dynamic_share"] for m in MODES},
        "tok_per_s": base_meta["figures"]["tok_per_s"],
        "tok_per_s_by_phase": {"base": base_meta["figures"]["tok_per_s"],
                               **{k: exports[k]["figures"]["tok_per_s"] for k in ("stage1", "unfrozen")}},
    }
    ckpt.save_json(report, get_base_dir() / "speedrun.json")
    plot(get_base_dir() / "speedrun.png", {k: Path(getattr(args, k)) for k in ("base", "stage1", "unfrozen")}, evals)

    print(f"held-out bits per byte ({evals['base']['eval_tokens']:,} tokens)")
    print(f"{'':<28}{'parameters':>12}" + "".join(f"{m:>10}" for m in MODES))
    for name, label in LABELS.items():
        print(f"{label:<28}{evals[name]['params']['total']:>12,}" + "".join(f"{bpb(name, m):>10.4f}" for m in MODES))
    print(f"{'width':<40}" + "".join(f"{final[m]['width']:>10}" for m in MODES))
    print(f"{'matmul FLOPs of attention + MLP':<40}" + "".join(f"{final[m]['dynamic_share']:>10.1%}" for m in MODES))
    print(f"{'FLOPs of the whole model':<40}" + "".join(f"{final[m]['flops_share']:>10.1%}" for m in MODES))
    print(f"bits per byte of the untrained base {report['bpb']['step0']:.4f}; base to hybrid max |delta logit| {delta:.1e}")
    print("training tok/s: " + ", ".join(f"{k} {v:,.0f}" for k, v in report["tok_per_s_by_phase"].items()))
    print(f"{report['seconds']} s in all: " + json.dumps(times))


if __name__ == "__main__":
    main()
