# What the scripts of this folder share: start one process per task by srun, and start the job again where that may
# help. Sourced by a batch script in the root of the repository; docs/cluster.md says what each exit code means.
#
#   train "$@"      python train.py with the arguments, and the rules below
#   start_tasks     srun COMMAND...: its exit code, nothing else
#
# Settings of the environment, all optional (sbatch passes the environment on to the job):
#   LDM_IMAGE          container: NAME or FILE.sqsh for pyxis, FILE.sif for apptainer; null: no container
#   LDM_MOUNTS         more folders the container sees, FROM:TO,FROM:TO; the working directory it always sees
#   LDM_MAX_RESTARTS   restarts in a row without a new checkpoint before the job gives up (default 3)
#   LDM_JOBS           where jobs keep their notes (default .ldm_jobs, on a file system that all nodes share)
# shellcheck shell=bash

# ---- one process per task ------------------------------------------------------------------------------

# Rank 0 is on the first node; its address is the one by which Slurm itself reaches the node, so no name has to
# resolve. The port is drawn from the job and its restart: jobs that share a node do not meet, nor does a job meet
# what may be left of itself; and it is below the ports that systems hand out by themselves (32768 and up).
rendezvous() {
    local hosts address
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    address=$(scontrol show node -o "${hosts[0]}" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p') || true
    export MASTER_ADDR="${address:-${hosts[0]}}"
    export MASTER_PORT=$((20000 + (SLURM_JOB_ID + 101 * ${SLURM_RESTART_COUNT:-0}) % 12000))
}

# srun gets the command and nothing around it: where Slurm tracks processes by cgroups, its signals reach the
# processes that it started itself, not their children (so no `bash -c` in between). --wait=0: a process that is done
# well, however early, stops no other (a site may have set another default).
start_tasks() {
    local options=(--kill-on-bad-exit=1 --wait=0 --cpu-bind=cores) inside=() mounts
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
        export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun does not take it from sbatch
    fi
    export PYTHONFAULTHANDLER=1
    export TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_FR_BUFFER_SIZE=20000 # who waited for whom, after a hang
    mounts="$PWD:$PWD${LDM_MOUNTS:+,$LDM_MOUNTS}"
    case ${LDM_IMAGE:-} in
        '') ;;
        *.sif) inside=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$LDM_IMAGE") ;;
        *) options+=(--container-image="$LDM_IMAGE" --container-mounts="$mounts" --container-workdir="$PWD") ;;
    esac
    srun "${options[@]}" "${inside[@]}" "$@"
}

# ---- once more, or not ---------------------------------------------------------------------------------

# Sum of the newest committed steps of the run's stages; it grows if and only if a run gets on. Which run it is
# train.py notes in the file `run`; before that there is none.
committed() {
    local run manifest step stage sum=0
    local -A newest=()
    run=$(cat "$LDM_JOB_DIR/run" 2>/dev/null) || run=/dev/null
    for manifest in "$run"/checkpoints/step-*/MANIFEST.json "$run"/*/checkpoints/step-*/MANIFEST.json; do
        [[ $manifest =~ ^(.*)/step-0*([0-9]+)/MANIFEST\.json$ && -e $manifest ]] || continue
        stage=${BASH_REMATCH[1]} step=${BASH_REMATCH[2]}
        if ((step > ${newest[$stage]:-0})); then newest[$stage]=$step; fi
    done
    for step in "${newest[@]}"; do sum=$((sum + step)); done
    echo "$sum"
}

# judge START: what came of a start of this job (0 the first, then its restarts), in the file `starts`: up to which
# start that is counted, the committed steps, and how many restarts in a row have added none. A start is judged at
# its end, or by the next one if it did not live to see it (node lost, batch script killed).
judge() {
    local counted=-1 steps=0 idle=0 now
    if [[ -s $LDM_JOB_DIR/starts ]]; then read -r counted steps idle <"$LDM_JOB_DIR/starts"; fi
    if (($1 > counted)); then
        now=$(committed)
        if ((now > steps || counted < 0)); then idle=0; else idle=$((idle + 1)); fi
        echo "$1 $((now > steps ? now : steps)) $idle" >"$LDM_JOB_DIR/starts.new"
        mv "$LDM_JOB_DIR/starts.new" "$LDM_JOB_DIR/starts"
    fi
    ((idle < ${LDM_MAX_RESTARTS:-3}))
}

say() { echo "ldm: job $SLURM_JOB_ID: $*" >&2; }

give_up() {
    say "${LDM_MAX_RESTARTS:-3} restarts made no new checkpoint; see the log above, then submit it again"
    finish 3
}

# The notes go, so that a job which somebody requeues by hand has all its restarts again.
finish() {
    rm -rf "$LDM_JOB_DIR"
    exit "$1"
}

requeue() {
    local try
    for try in 1 2 3 4 5; do
        if scontrol requeue "$SLURM_JOB_ID"; then
            say "exit code $1, requeued: it goes on from its newest checkpoint"
            exit "$1" # Slurm has put it back into the queue already, whatever this code is
        fi
        say "cannot requeue (try $try of 5)"
        sleep 10
    done
    exit "$1"
}

# COMMAND...: as tasks, under the rules of train.py's exit codes. 2 and 3 are for a human, 130 is one's wish, 0 is the
# end, all others are tried again. Of many processes srun reports the largest code, and that is 143 as soon as it has stopped the
# rest; so train.py notes in the file `exit` with which code the first of them ended.
until_done() {
    local start=${SLURM_RESTART_COUNT:-0} code=0 first known=
    export LDM_JOB_DIR="${LDM_JOBS:-$PWD/.ldm_jobs}/${SLURM_CLUSTER_NAME:-slurm}-$SLURM_JOB_ID"
    if ((start == 0)); then rm -rf "$LDM_JOB_DIR"; fi
    if [[ -d $LDM_JOB_DIR ]]; then known=yes; fi
    mkdir -p "$LDM_JOB_DIR"
    rm -f "$LDM_JOB_DIR/exit"
    if [[ -n $known ]] && ! judge $((start - 1)); then give_up; fi
    start_tasks "$@" || code=$?
    if ((code == 0)); then finish 0; fi
    first=$(cat "$LDM_JOB_DIR/exit" 2>/dev/null) || first=$code
    case $first in
        2 | 3 | 130)
            say "exit code $first: not started again; see the log above"
            finish "$first"
            ;;
    esac
    if ! judge "$start"; then give_up; fi
    requeue "${first:-$code}"
}

# train.py on all GPUs; on nodes without any, add trainer.accelerator=cpu trainer.devices=TASKS_PER_NODE.
train() {
    [[ " $*" == *" trainer="* ]] || set -- "$@" trainer=ddp
    rendezvous
    until_done python -u train.py "$@"
}
