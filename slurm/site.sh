# What differs from site to site: read by slurm/train.sh when the job starts, and by slurm/interactive.sh.
# Remove the # from what you need.

# --- Account and partition. sbatch must know them before the job exists: run `. slurm/site.sh` once in the
# shell that you submit from, or give --account and --partition to sbatch. Any option of sbatch has such a
# variable; salloc takes SALLOC_ACCOUNT and SALLOC_PARTITION.
# export SBATCH_ACCOUNT=my_project SALLOC_ACCOUNT=my_project
# export SBATCH_PARTITION=compute SALLOC_PARTITION=compute

# --- Modules: the MPI that hvd_train was built for, and whatever Python needs.
# module load gcc openmpi

# --- Which Python: any that has hvd_train installed. By default the environment in VENV, else the one that was
# active when you submitted, else .venv beside slurm/, else python3.
# VENV=$HOME/envs/train
if [[ -n ${VENV:-} ]]; then
    python=$VENV/bin/python
elif [[ -n ${VIRTUAL_ENV:-} ]]; then
    python=$VIRTUAL_ENV/bin/python
elif [[ -x .venv/bin/python ]]; then
    python=$PWD/.venv/bin/python
else
    python=python3
fi

# --- Launcher: srun, which must know the MPI's PMI (`srun --mpi=list`), or mpirun (slurm/site-nopmix.sh).
# export HVD_TRAIN_LAUNCHER=srun
# export SLURM_MPI_TYPE=pmix

# --- Network interface between hosts, where the one that leads to the others is the wrong one.
# export HVD_TRAIN_INTERFACE=ib0

# --- Seconds after which a start that has not reached its first step is ended (0: never), and tried again.
# export HVD_TRAIN_START_TIMEOUT=1800

# --- After an interruption: 0 does not put the job into the queue again; give up after this many
# consecutive starts without a new checkpoint.
# export HVD_TRAIN_REQUEUE=0
# export HVD_TRAIN_RESTARTS=3
