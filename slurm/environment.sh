# Where distilcb and its Python are: job.sh sources it in a job, pipeline.sh where jobs are submitted. A user's own
# settings go to slurm/site.sh.
#
# It leaves the shell in distilcb's folder with $python to start, and has these functions:
#   say WORDS       a line with the time, for the log
#   refuse WORDS    an error message, and the end with exit code 2

say() { echo "$(date +%FT%T) $*"; }

refuse() {
    echo "LaunchError: $*" >&2
    exit 2
}

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null || exit 2

if [ -n "${DISTILCB_SITE:-}" ] && [ ! -f "$DISTILCB_SITE" ]; then
    refuse "DISTILCB_SITE=$DISTILCB_SITE is not there. Copy slurm/site.sh.example, or unset it."
fi
if [ -f "${DISTILCB_SITE:-slurm/site.sh}" ]; then
    set +u # modules and activate scripts use variables that are not set
    . "${DISTILCB_SITE:-slurm/site.sh}" || refuse "${DISTILCB_SITE:-slurm/site.sh} failed: run '. ${DISTILCB_SITE:-slurm/site.sh}' by hand to see why."
    set -u
fi
if [ -n "${PYTHON:-}" ]; then
    # shellcheck disable=SC2206  # a container's command has several words
    python=($PYTHON)
elif [ -x .venv/bin/python ]; then
    python=("$PWD/.venv/bin/python")
else
    python=(python3)
fi
command -v "${python[0]}" >/dev/null || refuse "${python[0]} is not there on $(hostname): mend PYTHON in slurm/site.sh (see slurm/site.sh.example)."
# -P: the package that is installed, not the folder that lies here.
"${python[@]}" -P -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("distilcb", "deepspeed"))))' ||
    refuse "${python[*]} has no distilcb on $(hostname). Run 'make install' here, or say in slurm/site.sh how to get to it (see slurm/site.sh.example)."
