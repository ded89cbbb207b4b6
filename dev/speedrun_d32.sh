#!/usr/bin/env bash
# The seed workflow on a machine with GPUs: nanochat-d32 -> hybrid of 6.45 B -> 9.3 B -> 21 B, trained at each size.
# download -> surgery -> stage 1 -> grow to 2560 -> stage 2 -> grow to 4096 -> stage 3
#
#   bash speedrun.sh d32            run, or go on where an interrupted run stopped, on all GPUs of this machine
#   bash speedrun.sh d32 --check    look for GPUs, disk and network, and do nothing else
#
# Settings, from the environment: NANOCHAT_BASE_DIR (where artifacts go, default ~/.cache/nanochat), DATA (what
# fractal_train --data takes; default: its own), STAGE1_STEPS, STAGE2_STEPS, STAGE3_STEPS (default: what the first plan's 40,
# 50 and 100 hours on 8 H100s buy at 40 % MFU, see `python -m scripts.plan`), BATCH (rows per GPU and pass, 8),
# TOTAL_BATCH (tokens per step, 524288), RUN (a name for wandb), TRAIN_FLAGS (more flags of fractal_train, such as --compile).
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
    ""|--check) ;;
    *) sed -n '2,/^set /p' "$0" | sed '$d' | cut -c3-; [ "$1" = --help ] || [ "$1" = -h ] && exit 0; exit 2 ;;
esac
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
STAGE1_STEPS=${STAGE1_STEPS:-40000} STAGE2_STEPS=${STAGE2_STEPS:-28900} STAGE3_STEPS=${STAGE3_STEPS:-24200}
BATCH=${BATCH:-8} TOTAL_BATCH=${TOTAL_BATCH:-524288} DATA=${DATA:-} TRAIN_FLAGS=${TRAIN_FLAGS:-}

base="$NANOCHAT_BASE_DIR/chatsft_checkpoints/d32"
work="$NANOCHAT_BASE_DIR/speedrun_d32"
hybrid="$NANOCHAT_BASE_DIR/hybrid_checkpoints" trained="$NANOCHAT_BASE_DIR/fractal_checkpoints"

# --- what it needs, looked at before anything is done. The probes can be replaced, for tests and odd machines.
DISK_GB=900  # in all: tests/test_plan.py holds it against what the code computes
GPU_PROBE=${GPU_PROBE:-"nvidia-smi --list-gpus"}                              # prints a line for each GPU
DISK_PROBE=${DISK_PROBE:-"df --output=avail --block-size=1000000000"}         # + folder: its last line is the free GB
USED_PROBE=${USED_PROBE:-"du --summarize --total --block-size=1000000000"}    # + folders: its last line is what they hold
NETWORK_PROBE=${NETWORK_PROBE:-"curl --silent --head --max-time 15 --output /dev/null ${HF_ENDPOINT:-https://huggingface.co}"}
fail() {
    echo "error: $*" >&2
    exit 2
}
from_hub() {  # DATA: whether any of its sources is neither the embedded text nor a path, by the rules of nanochat.mixture,
    local sources source  # which may not be installed yet
    [ -n "$1" ] || return 0
    [ ! -e "${1/#\~/$HOME}" ] || return 1
    IFS=, read -ra sources <<< "$1"
    for source in "${sources[@]}"; do
        read -r source <<< "${source#*\*}"
        [[ "$source" = embedded || "$source" = [./~]* || -e "$source" ]] || return 0
    done
    return 1
}
gpus=$( ($GPU_PROBE) 2>/dev/null | grep -c . || true)
[ "$gpus" -gt 0 ] || fail "no GPU is found ('$GPU_PROBE' lists none), and this trains models of 6 to 21 billion parameters:" \
    "run it on a machine with GPUs (8 of 80 GB are what it is made for); bash speedrun.sh without d32 runs anywhere"
for name in BATCH TOTAL_BATCH; do
    [[ "${!name}" =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name} is no positive number: leave it unset, or give one"
done
one_pass=$((BATCH * 2048 * gpus))
[ $((TOTAL_BATCH % one_pass)) -eq 0 ] || fail "TOTAL_BATCH=$TOTAL_BATCH tokens are no multiple of the $one_pass of one pass" \
    "($BATCH rows x 2048 x $gpus GPUs): set TOTAL_BATCH=$(((TOTAL_BATCH / one_pass + (TOTAL_BATCH < one_pass)) * one_pass))," \
    "or another BATCH"
folder="$NANOCHAT_BASE_DIR"
while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
free=$($DISK_PROBE "$folder" | tail -n 1 | awk '{print $1}')
used=$( ($USED_PROBE "$base" "$hybrid"/d32_* "$trained"/d32_* "$NANOCHAT_BASE_DIR/base_data" || true) 2>/dev/null |
    tail -n 1 | awk '{print $1}')
needed=$((DISK_GB - ${used:-0}))
[ "$free" -ge "$needed" ] || fail "$NANOCHAT_BASE_DIR has $free GB of free disk, and $needed GB more are needed ($DISK_GB in" \
    "all, ${used:-0} are there): free some, or set NANOCHAT_BASE_DIR to a larger disk"
missing="" download=""
ls "$base"/model_*.pt >/dev/null 2>&1 || { missing="nanochat-d32" download="--download"; }
[ -e "$work/data.done" ] || ! from_hub "$DATA" || missing="${missing:+$missing and }the training data"
if [ -n "$missing" ] && ! $NETWORK_PROBE >/dev/null 2>&1; then
    fail "$missing must be downloaded, and the hub does not answer: connect this machine, or put the model into $base and" \
        "set DATA=embedded (or a file) for the data"
fi
echo "$gpus GPUs, $free GB of free disk ($needed needed)${missing:+, to download: $missing}"
[ "${1:-}" != --check ] || exit 0

# --- the work
source dev/setup.sh cuda
python -m scripts.get_kernels  # before anything takes hours: stage 1 refuses to train without them
mkdir -p "$work"
settings="DATA=$DATA STAGE1_STEPS=$STAGE1_STEPS STAGE2_STEPS=$STAGE2_STEPS STAGE3_STEPS=$STAGE3_STEPS TOTAL_BATCH=$TOTAL_BATCH"
if [ -e "$work/settings" ] && [ "$(cat "$work/settings")" != "$settings" ]; then
    fail "an earlier run in $NANOCHAT_BASE_DIR had other settings ($(cat "$work/settings")): use those, or another" \
        "NANOCHAT_BASE_DIR"
fi
echo "$settings" > "$work/settings"

run() {  # NAME COMMAND...: a part that is done is not done again
    local name="$1"
    shift
    if [ ! -e "$work/$name.done" ]; then
        echo
        echo "== $name: $*"
        "$@"
        touch "$work/$name.done"
    fi
}
train() {  # STAGE WIDTH STEPS: resumes from its newest checkpoint; what only a resume needs is deleted behind it
    # torchrun kills an interrupted run after 30 s, which is too early to have saved what stage 3 holds
    run "stage$1" torchrun --standalone --nproc_per_node="$gpus" --shutdown-timeout 900 -m scripts.fractal_train \
        --checkpoint "$hybrid/d32_$2/model.pt" --stage "$1" --expanded-dim="$2" --matryoshka --sample-dim \
        --num-iterations "$3" --device-batch-size "$BATCH" --total-batch-size "$TOTAL_BATCH" --gradient-checkpointing \
        --keep-checkpoints 2 ${DATA:+--data "$DATA"} ${RUN:+--run "$RUN-stage$1"} $TRAIN_FLAGS
    rm -rf "$trained/d32_$2"/step_*
}
run data python -m nanochat.mixture ${DATA:+--data "$DATA"}
run surgery python -m scripts.surgery --new-dim=2048 $download
train 1 2048 "$STAGE1_STEPS"
run grow2560 python -m scripts.surgery --expand-from=2048 --new-dim=2560 --dtype auto
train 2 2560 "$STAGE2_STEPS"
run grow4096 python -m scripts.surgery --expand-from=2560 --new-dim=4096 --dtype auto
train 3 4096 "$STAGE3_STEPS"
cat <<END

Models: $trained/d32_2048, d32_2560, d32_4096
To go on:  source ${VIRTUAL_ENV}/bin/activate
           python -m scripts.fractal_eval --checkpoint $trained/d32_4096
           python -m scripts.chat_cli --checkpoint $trained/d32_4096 --mode normal
END
