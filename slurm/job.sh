# What the *.sbatch files of this folder have in common; they source it. A user's own settings go to slurm/site.sh.
#
# It leaves the job in the repository's folder with $python to start, and has these functions:
#   say WORDS       a line with the time, for the job's log
#   refuse WORDS    an error message, and the job ends with exit code 2
#   launch WORDS    srun of $python, a task a rank, in the background; waits for it through signals; $? is srun's
#   is_running      whether this job is to go on, as far as Slurm says: not COMPLETING, CANCELLED, ...
#   is_preempted    whether Slurm has taken the nodes of this start for another job

say() { echo "$(date +%FT%T) $*"; }

refuse() {
    echo "LaunchError: $*" >&2
    exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || refuse "$0 is for Slurm: submit it with sbatch from the repository's folder."
cd "${DISTILCB_HOME:-$SLURM_SUBMIT_DIR}" && [ -f launch/train.py ] ||
    refuse "${DISTILCB_HOME:-$SLURM_SUBMIT_DIR} is not distilcb's folder. Submit from there: cd distilcb && sbatch slurm/…; or set DISTILCB_HOME."

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

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # Slurm 22.05 and later do not pass it on by themselves
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE-1} # compute nodes have no network; set it to nothing in the site file if yours do
export PYTHONUNBUFFERED=1

launch() {
    # --kill-on-bad-exit: a rank that fails ends all. --wait=0: one that has finished ends none.
    # shellcheck disable=SC2086
    srun --kill-on-bad-exit=1 --wait=0 ${DISTILCB_SRUN:-} "${python[@]}" "$@" &
    local child=$! code
    while :; do
        wait "$child"
        code=$?
        kill -0 "$child" 2>/dev/null && continue # a trapped signal ended wait early
        [ "$code" -le 128 ] || { wait "$child"; code=$?; } # or as srun ended: bash has kept srun's own
        return "$code"
    done
}

is_running() {
    case $(squeue --noheader --jobs "$SLURM_JOB_ID" --format=%T 2>/dev/null) in
    RUNNING | SIGNALING) ;; # the second while a signal is on its way
    *) return 1 ;;
    esac
}

is_preempted() {
    local facts preempted started
    facts=" $(scontrol --oneliner show job "$SLURM_JOB_ID" 2>/dev/null)"
    preempted=$(sed -n 's/.* PreemptTime=\([0-9][^ ]*\).*/\1/p' <<< "$facts")
    started=$(sed -n 's/.* StartTime=\([0-9][^ ]*\).*/\1/p' <<< "$facts")
    [ -n "$preempted" ] && [[ ! "$preempted" < "$started" ]] # an earlier start's is older
}
