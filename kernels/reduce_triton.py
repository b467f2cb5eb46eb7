"""How reducing kernels finish in one launch: each program leaves a part, and the last to arrive merges all of them."""

import triton
import triton.language as tl


@triton.jit
def is_last(arrived_ptr):
    """True in the last of the programs along axis 0 to come here, which can read what all have written.

    As PyTorch's `x_grid_barrier` (torch/_inductor/runtime/triton_helpers.py) has it, the barrier comes before the
    atomic: one thread counts for all of its program. The last sets the counter back, for the next launch.
    """
    tl.debug_barrier()
    arrived_ptr += tl.program_id(1)
    last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(arrived_ptr, 0)
    return last
