"""
The speedrun's final table, and speedrun.json in NANOCHAT_BASE_DIR. speedrun.sh calls it with the folders it made.
"""
import argparse
import json
from pathlib import Path

from nanochat import checkpoint_manager as ckpt
from nanochat.common import cli, get_base_dir

MODES = ("ghost", "whisper", "normal", "think")


@cli
def main(argv=None):
    p = argparse.ArgumentParser(description="Print a speedrun's table and write speedrun.json.")
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

    print(f"held-out bits per byte ({evals['base']['eval_tokens']:,} tokens)")
    print(f"{'':<28}{'parameters':>12}" + "".join(f"{m:>10}" for m in MODES))
    labels = {"base": "base", "surgery": "hybrid after surgery", "stage1": "hybrid after stage 1",
              "unfrozen": "hybrid after unfrozen phase"}
    for name, label in labels.items():
        print(f"{label:<28}{evals[name]['params']['total']:>12,}" + "".join(f"{bpb(name, m):>10.4f}" for m in MODES))
    print(f"{'width':<40}" + "".join(f"{final[m]['width']:>10}" for m in MODES))
    print(f"{'matmul FLOPs of attention + MLP':<40}" + "".join(f"{final[m]['dynamic_share']:>10.1%}" for m in MODES))
    print(f"{'FLOPs of the whole model':<40}" + "".join(f"{final[m]['flops_share']:>10.1%}" for m in MODES))
    print(f"bits per byte of the untrained base {report['bpb']['step0']:.4f}; base to hybrid max |delta logit| {delta:.1e}")
    print("training tok/s: " + ", ".join(f"{k} {v:,.0f}" for k, v in report["tok_per_s_by_phase"].items()))
    print(f"{report['seconds']} s in all: " + json.dumps(times))


if __name__ == "__main__":
    main()
