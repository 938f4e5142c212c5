"""`hvd_train doctor`: what would run here, on this process alone or on every rank of a job.

options    the command line; imports neither torch nor MPI
check      what one check says, and the one way to run it
software   Python, this package, Horovod, the launcher on PATH, the launcher that started this process
host       cores, what MPI may use within a host, shared memory, limits
network    interfaces, and what an MPI over TCP should be told
storage    the folder of the runs, and locks in it
slurm      the allocation, and whether srun fits the MPI
need       what a model and its data take
memory     what the ranks of a host hold at the peak of a training
parts      torch, the ring's extensions, MPI: what must be loaded to be known
probe      the child that loads them, and brings the ranks together
child      the other end: a child with a deadline, which may hang or crash
world      what can be said once all ranks have reported; what is alike and what differs
text       the report for people
run        the whole

A check that looks at files of the system takes the folder in which /proc and /sys lie.
"""
