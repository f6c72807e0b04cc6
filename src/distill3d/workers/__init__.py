"""Independent tasks on many processes or machines: each is made once, and again elsewhere when its worker fails.

`executor.py` has the interface, `Here` and the rules for retries; `processes.py` runs tasks in processes of this
machine, `ray_cluster.py` on a Ray cluster; `store.py` is storage that all machines share.
"""
