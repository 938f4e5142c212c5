"""`hvd_train doctor`: what would run here, on this process alone or on every rank of a job.

options    the command line; imports neither torch nor MPI
check      the result of one check, and the one way to run it
software   Python, this package, Horovod, the launcher on PATH, the launcher that started this process
host       cores, what MPI may use within a host, shared memory, limits
network    interfaces, and which of them an MPI over TCP should use
storage    the folder of the runs, and locks in it
slurm      the allocation, and whether srun fits the MPI
choices    what of the configuration can be judged without a run
need       the memory that a model and its data take
memory     what the ranks of a host hold at the peak of a training
parts      torch, the ring's extensions, MPI: what must be loaded to be known
probe      the child that loads them, and connects the ranks
child      the parent's side: a child with a deadline, which may hang or crash
world      the reports of all ranks: what is alike and what differs
text       the report as text
run        the whole

A check that reads files of the system takes the folder that holds /proc and /sys.
"""
