"""Engines: who does the heavy work, beside the process that a command runs in.

`options` says what can be asked for and `choose` gives it; `dispatch` hands out shards to a
crew of processes, which are this machine's (`processes`) or Ray's (`on_ray`); each of them
is a `worker`.
"""
