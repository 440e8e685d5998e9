# What the *.sbatch files of this folder have in common; they source it. To what environment.sh leaves it adds
#   launch WORDS    srun of $python, a task a rank, in the background; waits for it through signals; $? is srun's
#   requeue_at_limit COMMAND   at the time limit, if more is finished by then: COMMAND prints how much
#   value_of OPTION WORDS   what an option is given among words
#   is_running      whether this job is to go on, as far as Slurm says: not COMPLETING, CANCELLED, ...
#   is_preempted    whether Slurm has taken the nodes of this start for another job

. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh" || exit 2 # $python, say, refuse
[ -n "${SLURM_JOB_ID:-}" ] || refuse "$0 is for Slurm: submit it with sbatch from the repository's folder."

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

# A job whose finished work is kept, and which comes to its time limit, goes on in another slice if it has finished any.
# COMMAND prints how much is finished. Before it, the file's first line: trap 'warned=1' USR1
requeue_at_limit() { # COMMAND
    count_finished=$1
    finished_before=$("$count_finished")
    trap at_limit USR1
    [ -z "${warned:-}" ] || refuse "the time limit is near before work has begun. Ask for more --time."
}

at_limit() {
    say "the time limit is near"
    if [ "$("$count_finished")" = "$finished_before" ]; then
        say "nothing was finished in this slice, so another would not help: ask for more --time" >&2
    elif scontrol requeue "$SLURM_JOB_ID"; then
        say "what is finished is kept, and the job is requeued"
    else
        say "what is finished is kept, but Slurm refused to requeue: submit the same line again" >&2
    fi
}

value_of() { # OPTION WORDS...: of the last one among the words
    local option=$1 value= before=
    shift
    for word in "$@"; do
        [ "$before" != "$option" ] || value=$word
        case $word in "$option="*) value=${word#*=} ;; esac
        before=$word
    done
    echo "$value"
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
