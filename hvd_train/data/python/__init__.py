"""Samples of a Python object in place of shards: a torch `Dataset`, another sequence, or an iterable."""
