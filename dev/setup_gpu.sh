#!/usr/bin/env bash
# Takes a bare machine with NVIDIA GPUs to a checked installation: system packages, Python packages, the Mamba-2 kernels, and
# a check of two minutes on the first GPU. It can be run again: what is installed is not installed again.
#
#   bash dev/setup_gpu.sh               install, check, and say what to run next
#   bash dev/setup_gpu.sh --no-check    install only
#
# It does not install NVIDIA's driver, and no Python before 3.10 will do. System packages are installed where this user may
# (root, on Debian or Ubuntu); elsewhere the command is printed. nvcc is not needed.
# Settings, from the environment: PYTHON (default python3), MINUTES (of the check, default 2).
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
    ""|--no-check) ;;
    *) sed -n '2,/^set /p' "$0" | sed '$d' | cut -c3-; [ "$1" = --help ] || [ "$1" = -h ] && exit 0; exit 2 ;;
esac
PYTHON=${PYTHON:-python3} MINUTES=${MINUTES:-2}
GPU_PROBE=${GPU_PROBE:-"nvidia-smi --list-gpus"}                     # prints a line for each GPU
DISK_PROBE=${DISK_PROBE:-"df --output=avail --block-size=1000000000 ."}  # its last line is the free GB
DISK_GB=12  # torch for CUDA and the rest, unpacked, and pip's downloads
fail() {
    echo "error: $*" >&2
    exit 2
}
gpus=$( ($GPU_PROBE) 2>/dev/null | grep -c . || true)
[ "$gpus" -gt 0 ] || fail "no GPU is found ('$GPU_PROBE' lists none): install NVIDIA's driver first, which this script does" \
    "not, or rent a machine that has it"
[[ "$MINUTES" =~ ^[0-9.]*[1-9][0-9.]*$ ]] || fail "MINUTES=$MINUTES is no positive number"

# What Python packages cannot bring: a virtual environment, and the compiler and headers with which Triton builds launchers.
missing_packages() {
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    "$PYTHON" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' \
        2>/dev/null || echo python3-dev
    command -v "${CC:-cc}" >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null || echo build-essential
}
packages=$(missing_packages | paste -sd ' ' -)
if [ -n "$packages" ]; then
    install="apt-get update && apt-get install -y $packages"
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing system packages: $packages"
        apt-get update -qq && apt-get install -y -qq $packages >/dev/null || fail "'$install' failed: see its message above"
        left=$(missing_packages | paste -sd ' ' -)
        [ -z "$left" ] || fail "$PYTHON still lacks what $left bring: set PYTHON to the system's own, such as /usr/bin/python3"
    else
        fail "the system packages $packages are missing: run \`sudo sh -c '$install'\` (or your system's names of them), then" \
            "this script again"
    fi
fi
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$PYTHON is older than Python 3.10: install a later one and set PYTHON to it"
stamp="${VIRTUAL_ENV:-.venv}/.nanochat-installed-cuda"
free=$( ($DISK_PROBE) | tail -n 1 | awk '{print $1}')
[ -e "$stamp" ] || [ "$free" -ge "$DISK_GB" ] ||
    fail "this folder has $free GB of free disk, and the Python packages take $DISK_GB: free some, or move the folder"

source dev/setup.sh cuda
fault=$(python -c 'from nanochat.common import why_no_gpu; print(why_no_gpu() or "")')
[ -z "$fault" ] || fail "$fault; then run this script again"
python -m scripts.get_kernels
echo "installed: $gpus GPU$([ "$gpus" = 1 ] || echo s), $(python --version)"

if [ "${1:-}" != --no-check ]; then
    python -m scripts.gpu_check --minutes "$MINUTES" --json gpu_check.json ||
        fail "the check failed: its lines above say where, gpu_check.json has the figures; NANOCHAT_DEBUG=1 python -m" \
            "scripts.gpu_check shows the first error's origin"
fi
echo
echo "To go on:  source ${VIRTUAL_ENV}/bin/activate"
[ "$gpus" = 1 ] || echo "           torchrun --standalone --nproc_per_node=$gpus -m scripts.gpu_check     # all GPUs"
echo "           bash speedrun.sh$([ "$gpus" -lt 8 ] || echo ' d32')"
