#!/usr/bin/env bash
#SBATCH --job-name=hvd_train
#SBATCH --cpus-per-task=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
# One training as a batch job. Options of sbatch go before the script, those of hvd_train after it:
#
#     sbatch --nodes=4 --ntasks=16 --time=8:00:00 slurm/train.sh --config run.toml
#     sbatch --nodes=4 --ntasks-per-node=4 slurm/train.sh --config run.toml         # the same number of ranks
#     sbatch --array=1-3 --output=%x-%A_%a.log slurm/train.sh --config run.toml     # seeds 1, 2 and 3
#
# A rank is a task of Slurm: --ntasks, or --ntasks-per-node times --nodes; without both, one rank per node.
# Submit from the folder that holds slurm/. What the site needs is in slurm/site.sh, which is read first.
#
# 120 s before the time limit the run is asked to stop after its round. It writes a checkpoint, and the job
# puts itself into the queue again and resumes from there. The same happens after a preemption and after the
# loss of a node, until HVD_TRAIN_RESTARTS (3) starts in a row have written no checkpoint; HVD_TRAIN_REQUEUE=0
# leaves that to you. A start that fails before its first step, in MPI for instance, is tried again at once,
# up to as many times.
# The job's exit code is that of the training: 0 finished, 1 failed, 2 what you gave cannot be run, 3 it diverged,
# 75 interrupted and not put into the queue again. A job that depends on this one (afterok) starts after the real
# end only.
set -uo pipefail

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
restart=${SLURM_RESTART_COUNT:-0}
say() { printf 'slurm/train.sh: %(%F %T)T %s\n' -1 "$*"; }

# --- Signals of Slurm: USR1 to this shell before the time limit; TERM when it ends the job itself.
training='' notified='' stopped=''
stop_training() {
    say "$1: the training stops after its round, with a checkpoint"
    notified=1 stopped=1
    # USR1 and not TERM, which Slurm sends to the training as well: a second TERM might end it at once.
    if [[ -n $training ]]; then kill -USR1 "$training" 2>/dev/null; fi
}
trap 'stop_training "USR1, the time limit or a preemption is near"' USR1
trap 'stop_training "TERM, Slurm ends this job"' TERM

site=${HVD_TRAIN_SITE:-slurm/site.sh}
if [[ ! -f $site ]]; then
    say "no $site in $PWD; submit from the folder that holds slurm/, or name that folder with sbatch --chdir"
    exit 2
fi
. "$site"
if ! "$python" -c 'import hvd_train'; then
    say "$python has no hvd_train; say in $site which environment has it"
    exit 2
fi

# --- The options of the training.
given() { [[ " ${options[*]} " == *" $1 "* || " ${options[*]} " == *" $1="* ]]; }
options=("$@")
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]] && ! given --seed; then options+=(--seed "$SLURM_ARRAY_TASK_ID"); fi
if [[ $restart != 0 ]] && ! given --resume; then options+=(--resume auto); fi
# The training compares the length of its rounds with it.
export HVD_TRAIN_SIGNAL_LEAD_S=${HVD_TRAIN_SIGNAL_LEAD_S:-120}

worth_a_start() { "$python" -m hvd_train restarts --limit "${HVD_TRAIN_RESTARTS:-3}" -- "${options[@]}"; }

preempted() { [[ $(scontrol show job --oneliner "$SLURM_JOB_ID") == *" PreemptTime=2"* ]]; }

# Whether every host of the job can start a process. Slurm marks a lost one as down only after a while;
# mpirun has ended long before.
hosts_answer() {
    timeout 60 srun --overlap --mpi=none --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
        --ntasks-per-node=1 --cpus-per-task=1 true >/dev/null 2>&1
}

say "job $job on ${SLURM_JOB_NODELIST:-?}, start $((restart + 1))"

# --- How many ranks. Where no number was asked for, Slurm sets no variable, and those of the shell that submitted
# this job may still be there: only the job itself can be trusted.
asked=" $(scontrol show job --oneliner "$SLURM_JOB_ID" 2>/dev/null)"
if [[ $asked =~ \ NumTasks=([0-9]+) ]]; then
    export SLURM_NTASKS=${BASH_REMATCH[1]} SLURM_NPROCS=${BASH_REMATCH[1]}
    unset SLURM_NTASKS_PER_NODE
    if [[ $asked =~ \ NtasksPerN:B:S:C=([1-9][0-9]*) ]]; then export SLURM_NTASKS_PER_NODE=${BASH_REMATCH[1]}; fi
    if [[ $SLURM_NTASKS == "$SLURM_JOB_NUM_NODES" ]]; then
        export SLURM_TASKS_PER_NODE="1(x$SLURM_NTASKS)"
        say "one rank on each of $SLURM_NTASKS nodes; sbatch --ntasks or --ntasks-per-node asks for more"
    fi
fi
if [[ $restart != 0 ]] && ! worth_a_start; then
    say "job $job ends here, interrupted"
    exit 75
fi

# A failure later means something only if the check succeeds now.
can_ask=''
if hosts_answer; then can_ask=1; fi

launch() {
    # A training that begins now would not get the signal.
    if [[ -n $stopped ]]; then status=75 why_stopped='asked to stop before a start'; return; fi
    # In the background: a shell sees no signal while it waits for a command in the foreground.
    "$python" -m hvd_train launch --launcher "${HVD_TRAIN_LAUNCHER:-srun}" \
        ${HVD_TRAIN_INTERFACE:+--interface "$HVD_TRAIN_INTERFACE"} \
        ${HVD_TRAIN_START_TIMEOUT:+--start-timeout "$HVD_TRAIN_START_TIMEOUT"} -- "${options[@]}" &
    training=$!
    while notified=''; wait "$training"; status=$?; [[ -n $notified ]]; do :; done
    training=''
}

# How many starts of the run have reached their first step.
begun() { "$python" -m hvd_train restarts --begun -- "${options[@]}" 2>/dev/null; }

# Whether the start that has just ended never reached its first step, and another may: not after a stop, nor
# where what was given cannot be run (2) or does not converge (3).
worth_another_try() {
    [[ -z $stopped && $status != [023] && $status != 75 && $try -lt ${HVD_TRAIN_RESTARTS:-3} ]] &&
        ! preempted && [[ $(begun) == "$before" ]] && [[ -z $can_ask || $(hosts_answer && echo yes) == yes ]] &&
        [[ -z $stopped ]]
}

try=1 before=$(begun)
launch
while worth_another_try; do
    try=$((try + 1))
    say "the start ended with exit code $status before its first step; try $try of ${HVD_TRAIN_RESTARTS:-3}"
    if ! given --resume; then options+=(--resume auto); fi
    launch
done

# --- What happens to the job.
case $status in
    0 | 2 | 3) exit "$status" ;;
    75)
        why=${why_stopped:-interrupted, with a checkpoint}
        if preempted; then why="preempted; $why"; fi
        ;;
    *)
        if preempted; then
            why='preempted; ended without a new checkpoint'
        elif [[ -n $can_ask ]] && ! hosts_answer; then
            why='a host of this job no longer answers'
        else
            say "the training failed, exit code $status"
            exit "$status"
        fi
        ;;
esac

state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)
if [[ $state != RUNNING ]]; then
    say "$why; Slurm is ending job $job ($state) and puts it into the queue again or not"
elif [[ ${HVD_TRAIN_REQUEUE:-1} == 0 ]]; then
    say "$why; not put into the queue again: HVD_TRAIN_REQUEUE=0"
elif ! worth_a_start; then
    say "$why; not put into the queue again"
elif scontrol requeue "$SLURM_JOB_ID"; then
    say "$why; job $job is in the queue again"
else
    say "$why; Slurm does not put job $job into the queue again"
fi
exit "$status"
