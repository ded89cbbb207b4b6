# Sourced by speedrun.sh and tests/run.sh: makes .venv (or uses the active one), installs the project, activates it.
#   source dev/setup.sh [EXTRA]      EXTRA is a group of pyproject.toml, e.g. dev
# An install whose pyproject.toml and extra have not changed since is not repeated.
_extra="${1:-}"
_python="${PYTHON:-python3}"
if [ -z "${VIRTUAL_ENV:-}" ]; then
    if ! "$_python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: Python >= 3.10 is needed; set PYTHON to one, e.g. PYTHON=python3.11" >&2
        exit 2
    fi
    # the pip test: an interrupted venv may have a python already, but no pip
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1 && ! "$_python" -m venv .venv; then
        rm -rf .venv
        echo "error: '$_python -m venv' failed; install your system's venv package (Debian: python3-venv)" >&2
        exit 2
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi
_want="$(cksum < pyproject.toml) $_extra $PWD"
_stamp="$VIRTUAL_ENV/.nanochat-installed${_extra:+-$_extra}"
if [ "$(cat "$_stamp" 2>/dev/null)" != "$_want" ]; then
    echo "installing into $VIRTUAL_ENV (a minute or two; torch is large)"
    python -m pip install --quiet --disable-pip-version-check -e ".${_extra:+[$_extra]}"
    echo "$_want" > "$_stamp"
fi
