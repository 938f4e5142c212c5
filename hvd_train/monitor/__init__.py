"""What a run does and has done, by its event log: on any host, live or afterwards, without torch and MPI."""
