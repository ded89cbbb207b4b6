#!/usr/bin/env bash
# The whole life of a small Adamba on real text, on whatever hardware is here:
# corpus -> tokenizer -> base GPT -> surgery -> stage 1 -> unfrozen phase -> evaluation per mode -> a text sample.
#
#   bash speedrun.sh            run, or go on where an interrupted run stopped; a finished one shows its table again
#   bash speedrun.sh --fresh    delete an earlier speedrun's artifacts and start over
#   bash speedrun.sh d32        instead the seed workflow, nanochat-d32 to 21 B, on GPUs: dev/speedrun_d32.sh says more
#
# Settings, from the environment: NANOCHAT_BASE_DIR (where artifacts go, default ~/.cache/nanochat), DATA (default
# embedded; see `python -m nanochat.dataset --help`), DEPTH, VOCAB, BASE_STEPS, STAGE1_STEPS, UNFROZEN_STEPS.
set -euo pipefail
cd "$(dirname "$0")"
case "${1:-}" in
    ""|--fresh) ;;
    d32) shift; exec bash dev/speedrun_d32.sh "$@" ;;
    *) sed -n '2,/^set /p' "$0" | sed '$d' | cut -c3-; [ "$1" = --help ] || [ "$1" = -h ] && exit 0; exit 2 ;;
esac
source dev/setup.sh
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
work="$NANOCHAT_BASE_DIR/speedrun"

if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    # one GPU: a wider and longer run (not measured here)
    DEPTH=${DEPTH:-12} VOCAB=${VOCAB:-8192} rows=16 seq=1024
    BASE_STEPS=${BASE_STEPS:-1500} STAGE1_STEPS=${STAGE1_STEPS:-800} UNFROZEN_STEPS=${UNFROZEN_STEPS:-1600}
else
    DEPTH=${DEPTH:-4} VOCAB=${VOCAB:-4096} rows=8 seq=256
    BASE_STEPS=${BASE_STEPS:-600} STAGE1_STEPS=${STAGE1_STEPS:-115} UNFROZEN_STEPS=${UNFROZEN_STEPS:-125}
fi
DATA=${DATA:-embedded}

settings="DATA=$DATA DEPTH=$DEPTH VOCAB=$VOCAB BASE_STEPS=$BASE_STEPS STAGE1_STEPS=$STAGE1_STEPS UNFROZEN_STEPS=$UNFROZEN_STEPS rows=$rows seq=$seq"
width=$(python -c "from nanochat.gpt import GPTConfig; print(GPTConfig.from_depth($DEPTH, $VOCAB, $seq).n_embd)")
base="$NANOCHAT_BASE_DIR/base_checkpoints/speedrun"
hybrid="$NANOCHAT_BASE_DIR/hybrid_checkpoints/speedrun_$width"
stage1="$NANOCHAT_BASE_DIR/fractal_checkpoints/speedrun_$width"
unfrozen="$NANOCHAT_BASE_DIR/fractal_checkpoints/speedrun_${width}_unfrozen"
if [ "${1:-}" = --fresh ]; then
    rm -rf "$work" "$base" "$NANOCHAT_BASE_DIR"/hybrid_checkpoints/speedrun_* "$NANOCHAT_BASE_DIR"/fractal_checkpoints/speedrun_*
fi
mkdir -p "$work"
if [ -e "$work/settings" ] && [ "$(cat "$work/settings")" != "$settings" ]; then
    echo "error: an earlier speedrun in $NANOCHAT_BASE_DIR had other settings ($(cat "$work/settings")): use those, or" \
         "bash speedrun.sh --fresh, or another NANOCHAT_BASE_DIR" >&2
    exit 2
fi
echo "$settings" > "$work/settings"
echo "speedrun in $NANOCHAT_BASE_DIR: $settings"

# A stage that is done is not done again; the seconds of interrupted attempts count too (those of a SIGKILL are lost).
name="" since=$SECONDS
record() { [ -z "$name" ] || echo $((SECONDS - since)) >> "$work/$name.seconds"; }
trap record EXIT
stage() {
    name="$1" since=$SECONDS
    shift
    if [ ! -e "$work/$name.done" ]; then
        echo
        echo "== $name: $*"
        "$@"
        touch "$work/$name.done"
        record
    fi
    name=""
}
evaluate() {
    stage "eval_$1" python -m scripts.fractal_eval --checkpoint "$2" --data "$DATA" --eval-tokens 49152 --json "$work/$1.json"
}

shared=(--data "$DATA" --device-batch-size $rows --total-batch-size $((rows * seq)) --eval-tokens 16384
    --eval-every 200 --save-every 200 --log-every 20)
control=(--matryoshka --sample-dim --warmdown-ratio 0.8 "${shared[@]}")
stage tokenizer python -m scripts.tok_train --data "$DATA" --vocab-size "$VOCAB" --out "$work/tokenizer"
stage base python -m scripts.base_train --depth "$DEPTH" --max-seq-len $seq --tokenizer "$work/tokenizer" --tag speedrun \
    --num-iterations "$BASE_STEPS" "${shared[@]}"
evaluate base "$base"
stage surgery python -m scripts.surgery --src "$base"
evaluate surgery "$hybrid"
stage stage1 python -m scripts.fractal_train --checkpoint "$hybrid" --stage 1 --num-iterations "$STAGE1_STEPS" "${control[@]}"
evaluate stage1 "$stage1"
stage unfrozen python -m scripts.fractal_train --checkpoint "$stage1" --unfreeze --num-iterations "$UNFROZEN_STEPS" "${control[@]}"
evaluate unfrozen "$unfrozen"

echo
python -m scripts.speedrun_report --work "$work" --base "$base" --hybrid "$hybrid" --stage1 "$stage1" --unfrozen "$unfrozen"
for mode in think ghost; do
    echo
    echo "-- a sample in mode $mode:"
    python -m scripts.chat_cli --checkpoint "$unfrozen" -p "def read(self, " --mode $mode --max-tokens 80
done
cat <<END

Artifacts: $base
           $hybrid
           $stage1
           $unfrozen
           $NANOCHAT_BASE_DIR/speedrun.json and speedrun.png
To go on:  source ${VIRTUAL_ENV}/bin/activate
           python -m scripts.chat_cli --checkpoint $unfrozen --mode normal
           python -m scripts.fractal_eval --checkpoint $unfrozen
           python -m scripts.fractal_train --checkpoint $unfrozen --unfreeze --matryoshka --sample-dim --tag longer
END
