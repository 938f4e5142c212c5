"""`hvd_train export`: the model of a run as a file for other programs, checked before it is published."""
