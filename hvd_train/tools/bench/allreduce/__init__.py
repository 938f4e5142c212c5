"""`hvd_train bench allreduce`: the ring beside its peers and beside what the machine allows, in one run.

options    the command line; imports neither torch nor MPI
values     what the ranks combine, and whether the result is right
peers      what is compared, each at its best
gloo       torch.distributed's gloo, and the network that it takes
limit      what memory and wire allow
clock      one timed call, cold or warm; many of them, interleaved
session    the peers of one job, open, and their measurements
rows       medians, bus bandwidth, ratios
text       the report as text
run        the whole
"""
