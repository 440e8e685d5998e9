#!/bin/bash
# The whole way in one submission: text -> blocks -> student -> evaluation and model card.
#
#   bash slurm/pipeline.sh                        slurm/pipeline.example: the shipped teacher and text, a first try
#   bash slurm/pipeline.sh my_pipeline            your own copy of it
#
# On a login node: it checks what it can, submits a job a stage, each of which starts when the one before has ended well,
# and ends. A stage that fails cancels those after it. Mend what its log says and give the same line again: blocks,
# steps, fine-tunings that are finished are kept. docs/slurm.md says more.

set -uo pipefail
here=$(cd "${BASH_SOURCE[0]%/*}" && pwd)
file=$(realpath -m -- "${1:-$here/pipeline.example}") # before environment.sh goes to distilcb's folder
. "$here/environment.sh"

[ $# -le 1 ] || refuse "pipeline.sh takes one file, came $#: $*. What stages are given stands in it."
[ -f "$file" ] || refuse "$file is not there. Copy slurm/pipeline.example and say in it what each stage does."
command -v sbatch >/dev/null || refuse "no sbatch on $(hostname): start this on a login node of a Slurm cluster."

prepare=() distil=() evaluate=()
prepare_sbatch=() distil_sbatch=() evaluate_sbatch=()
. "$file" || refuse "$file failed: run 'bash -u $file' to see why."
[ $((${#prepare[@]} + ${#distil[@]} + ${#evaluate[@]})) -gt 0 ] || refuse "$file has no stage. Needed: prepare=(…), distil=(…) or evaluate=(…)."

# What is wrong with the words of a late stage should not be found out days later. It has told so itself.
[ ${#prepare[@]} -eq 0 ] || "${python[@]}" launch/prepare.py "${prepare[@]}" --check || exit
[ ${#distil[@]} -eq 0 ] || "${python[@]}" launch/train.py "${distil[@]}" --print_run_dir >/dev/null || exit
[ ${#evaluate[@]} -eq 0 ] || "${python[@]}" launch/evaluate.py "${evaluate[@]}" --check || exit

submitted=()
submit() { # STAGE FILE OPTIONS_OF_SBATCH... -- WORDS...: to start after the one before
    local stage=$1 batch_file=slurm/$2 options=() number after=
    shift 2
    while [ "$1" != -- ]; do options+=("$1") && shift; done
    shift
    [ $# -gt 0 ] || return 0 # a stage that is left out
    [ ${#submitted[@]} -eq 0 ] || after=${submitted[-1]}
    number=$(sbatch --parsable ${after:+--dependency=afterok:$after --kill-on-invalid-dep=yes} "${options[@]}" "$batch_file" "$@") || {
        [ ${#submitted[@]} -eq 0 ] || scancel "${submitted[@]}"
        refuse "Slurm does not take the stage $stage (see above), so none was submitted. Mend ${stage}_sbatch in $file."
    }
    submitted+=("${number%%;*}")
    say "$stage: job ${submitted[-1]}${after:+, after $after}"
}

submit prepare prepare.sbatch "${prepare_sbatch[@]}" -- "${prepare[@]}"
submit distil distill.sbatch "${distil_sbatch[@]}" -- "${distil[@]}"
# Fine-tuning and timing are one process's work.
alone=()
for word in "${evaluate[@]}"; do
    case $word in --tasks | --speed) alone=(--nodes=1 --ntasks-per-node=1 --gres=gpu:1) ;; esac
done
submit evaluate evaluate.sbatch "${alone[@]}" "${evaluate_sbatch[@]}" -- "${evaluate[@]}"
echo "squeue --jobs $(IFS=, && echo "${submitted[*]}")    shows where they are; scancel ${submitted[*]} ends them"
