"""`bench`: what a training step costs on this machine, and where its time goes.

    measure     the steps, and all that is told of them
    shapes      models of a named size with random weights
    flops       floating point operations of a step
    op_table    a profiled step's operations in groups

torch's profiler is imported here alone.
"""
