#!/usr/bin/env bash
# All stages that are not finished, each as a job that starts when those it needs have succeeded.
#   slurm/pipeline.sh [--dry-run] CONFIG [CONFIG ...] [key=value ...]
# --dry-run prints the table and submits nothing. Options for sbatch come from slurm/cluster.env.
# A stage of this run that is queued or running already is not submitted again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dry=
if [[ ${1:-} == --dry-run ]]; then
    dry=yes
    shift
fi
(($# >= 1)) || { echo "usage: slurm/pipeline.sh [--dry-run] CONFIG [CONFIG ...] [key=value ...]" >&2; exit 2; }
settings=${CLDF_CLUSTER_ENV:-slurm/cluster.env}
if [[ -f $settings ]]; then
    # shellcheck disable=SC1090  # the cluster's own file
    source "$settings"
fi
if [[ -z ${CLDF_PYTHON:-} ]]; then
    CLDF_PYTHON=python
    if [[ -x .venv/bin/python ]]; then CLDF_PYTHON=$PWD/.venv/bin/python; fi
fi

# one line a stage: name, finished or to-do, all-nodes or one-node, array, stages it needs
parts=${CLDF_CACHE_PARTS:-1}
table=$("$CLDF_PYTHON" -m cldf_dist.cli.slurm chain "$parts" "$@")

# jobs are known by the run's folder and the stage, in their comment
read -r run < <("$CLDF_PYTHON" -m cldf_dist.cli.slurm done run "$@")
run=$(realpath -m "${run%/*/DONE}")
if [[ -z $dry ]]; then # one at a time, or both would find nothing queued
    mkdir -p "$run"
    exec 9>"$run/.pipeline.lock"
    flock 9 || true # not every file system can
fi
declare -A job waiting
while IFS='|' read -r id comment; do
    if [[ -n $comment ]]; then waiting[$comment]=$id; fi
done < <(squeue --me --noheader --format='%F|%k' 2>/dev/null || true)

printf '%-22s %-9s %-22s %-34s %s\n' stage state job options after
while read -r stage state nodes array needs; do
    options=() words=("$@") after='' id=-
    queued=${waiting[$run/$stage]:-}
    if [[ $state == to-do && -n $queued ]]; then
        state=queued id=$queued
        job[$stage]=$id
    elif [[ $state == to-do ]]; then
        if [[ $nodes == all-nodes ]]; then
            read -ra options <<<"${CLDF_SBATCH:-}"
        else
            read -ra options <<<"${CLDF_SBATCH_ONE_NODE:-}"
        fi
        if [[ $array != - ]]; then
            options+=(--array="$array")
            words+=("cache.part=task/$parts")
        fi
        for need in $needs; do after+=${job[$need]:+:${job[$need]}}; done
        after=${after:+afterok$after}
        if [[ -n $dry ]]; then
            id=$stage
        else
            id=$(sbatch --parsable --job-name="cldf-$stage" --comment="$run/$stage" \
                ${after:+--dependency="$after" --kill-on-invalid-dep=yes} \
                "${options[@]}" slurm/stage.sbatch "$stage" "${words[@]}")
            id=${id%%;*} # clusters of a federation add their name
        fi
        job[$stage]=$id
    fi
    printf '%-22s %-9s %-22s %-34s %s\n' "$stage" "$state" "$id" "${options[*]:--}" "${after:--}"
done <<<"$table"
