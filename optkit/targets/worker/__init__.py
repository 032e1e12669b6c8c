"""The process that TensorRT runs in: standard library, TensorRT, and NumPy where arrays are sent. No optkit.

It is started by whichever Python has TensorRT (3.8 or later), so this package imports nothing from outside itself and
keeps to the syntax of 3.8. ``optkit.targets.worker_client`` is its other end.
"""
