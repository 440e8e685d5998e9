#!/bin/bash
# The whole way in one submission: text -> blocks -> student -> evaluation and model card.
#
#   bash slurm/pipeline.sh                        slurm/pipeline.example: the shipped teacher and text, a first try
#   bash slurm/pipeline.sh my_pipeline            your own copy of it
#
# On a login node: it checks what it can, submits a job a stage, each of which starts when the one before has ended well,
# and ends. A stage that fails cancels those after it. Mend what its log says and give the same line again: blocks,
# steps and fine-tunings that are finished are kept. docs/slurm.md says more.

set -uo pipefail
slurm_folder=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd) || exit 2
pipeline_file=$(realpath -m -- "${1:-$slurm_folder/pipeline.example}") # before environment.sh goes to distilcb's folder
. "$slurm_folder/environment.sh" || exit 2
export DISTILCB_HOME=$PWD # whose options are checked here; the jobs work there
for name in ${!SLURM_@}; do # an allocation that this shell is in is not the jobs'
    [ "$name" = SLURM_CONF ] || unset "$name"
done

[ $# -le 1 ] || refuse "pipeline.sh takes one file, came $#: $*. What stages are given stands in it."
[ -f "$pipeline_file" ] || refuse "$pipeline_file is not there. Copy slurm/pipeline.example and say in it what each stage does."
bash -n "$pipeline_file" || refuse "$pipeline_file is not bash, see above."
command -v sbatch >/dev/null || refuse "no sbatch on $(hostname): start this on a login node of a Slurm cluster."

prepare=() distill=() evaluate=()
prepare_sbatch=() distill_sbatch=() evaluate_sbatch=()
names_before=$(compgen -v)
. "$pipeline_file"
cd "$DISTILCB_HOME" || exit 2
for name in $(compgen -v | grep -vxF "$names_before" | grep -xE 'distil|prep|eval|.*_sbatch'); do
    refuse "$pipeline_file sets $name, which is no stage. Needed: prepare, distill, evaluate, and these with _sbatch."
done
[ $((${#prepare[@]} + ${#distill[@]} + ${#evaluate[@]})) -gt 0 ] || refuse "$pipeline_file has no stage. Needed: prepare=(…), distill=(…) or evaluate=(…)."

# What is wrong with the words of a late stage should not be found out days later. It has told so itself.
[ ${#prepare[@]} -eq 0 ] || "${python[@]}" launch/prepare.py "${prepare[@]}" --check || exit
[ ${#distill[@]} -eq 0 ] || "${python[@]}" launch/train.py "${distill[@]}" --print_run_dir >/dev/null || exit
[ ${#evaluate[@]} -eq 0 ] || "${python[@]}" launch/evaluate.py "${evaluate[@]}" --check || exit

submitted=() # jobs
after=       # what the next one waits for
submit() {   # STAGE OPTIONS_OF_SBATCH... -- WORDS...
    local stage=$1 options=() condition=afterok number
    shift
    while [ "$1" != -- ]; do
        # Of slices in a chain some may be lost, and the next one go on. Whether all was done the next stage sees.
        case $1 in -a* | --array*) condition=afterany ;; esac
        options+=("$1")
        shift
    done
    shift
    if [ $# -eq 0 ]; then
        say "$stage: left out"
        return
    fi
    number=$(sbatch --parsable ${after:+--dependency=$after --kill-on-invalid-dep=yes} "${options[@]}" "slurm/$stage.sbatch" "$@") || {
        [ ${#submitted[@]} -eq 0 ] || scancel "${submitted[@]}"
        refuse "Slurm does not take the stage $stage (see above), so none is submitted. Mend ${stage}_sbatch in $pipeline_file."
    }
    number=${number%%;*}
    say "$stage: job $number${after:+, $after}"
    submitted+=("$number")
    after=$condition:$number
}

submit prepare "${prepare_sbatch[@]}" -- "${prepare[@]}"
submit distill "${distill_sbatch[@]}" -- "${distill[@]}"
alone=() # fine-tuning and timing are one process's work
for word in "${evaluate[@]}"; do
    case $word in --tasks | --tasks=* | --speed) alone=(--nodes=1 --ntasks-per-node=1 --gres=gpu:1) ;; esac
done
submit evaluate "${alone[@]}" "${evaluate_sbatch[@]}" -- "${evaluate[@]}"
echo "squeue --jobs $(IFS=, && echo "${submitted[*]}")    shows where they are; scancel ${submitted[*]} ends them"
