#!/usr/bin/env bash
# Teaches a small hybrid arithmetic with the calculator, and the same hybrid without it: accuracy per mode against FLOPs.
# About 25 minutes on one core. Results: $NANOCHAT_BASE_DIR/chat_eval/*/chat_eval.json
set -euo pipefail
cd "$(dirname "$0")/.."
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:?give a folder of its own}"
problems="$NANOCHAT_BASE_DIR/problems"
one=(--device-batch-size 16 --total-batch-size 2048 --eval-tokens 8192 --log-every 50)
python -m dev.tool_arithmetic "$problems"
python -m scripts.tok_train --data "$problems/plain.jsonl" --vocab-size 512 --out "$NANOCHAT_BASE_DIR/tok"
python -m scripts.base_train --depth 4 --aspect-ratio 32 --head-dim 16 --max-seq-len 128 --tokenizer "$NANOCHAT_BASE_DIR/tok" \
    --tag arith --data "$problems/plain.jsonl" --num-iterations 800 --eval-every -1 "${one[@]}"
python -m scripts.surgery --src "$NANOCHAT_BASE_DIR/base_checkpoints/arith"
for kind in train plain; do
    python -m scripts.chat_sft --checkpoint "$NANOCHAT_BASE_DIR/hybrid_checkpoints/arith_128" --data "$problems/$kind.jsonl" \
        --tag "$kind" --num-iterations 800 --init-lr-frac 0.5 --eval-every 400 --tasks "" "${one[@]}"
    python -m scripts.fractal_train --checkpoint "$NANOCHAT_BASE_DIR/chatsft_checkpoints/$kind" --controls --tag "$kind" \
        --data "$problems/$kind.jsonl" --num-iterations 150 --eval-every -1 "${one[@]}"
    python -m scripts.chat_eval --checkpoint "$NANOCHAT_BASE_DIR/fractal_checkpoints/${kind}_128_auto" -a GSM8K \
        --data "$problems" -m 100
done
