# For a site whose srun has no PMIx (`srun --mpi=list` does not name it): mpirun starts the ranks, on the hosts of
# the allocation. Submit with
#
#     HVD_TRAIN_SITE=slurm/site-nopmix.sh sbatch slurm/train.sh --config run.toml
. slurm/site.sh

export HVD_TRAIN_LAUNCHER=mpirun
