"""Execution of the kernels' compiled code on a CPU: an interpreter of the PTX that Triton emits.

For sm_80 (mma.sync, ldmatrix, cp.async) and sm_90 (also wgmma, stmatrix, proxy fences). Every
access, barrier, wait and fence is checked, and sectors, bank conflicts and issue slots are counted.
What it does not know it refuses (`parse.Unsupported`).

    parse           PTX text to basic blocks of instructions
    translate       a block to a Python function on numpy arrays (CTAs, threads): `emitter`,
                    `arithmetic`, `transfers`; `values` computes, `issue` weighs
    machine         the threads of a batch of CTAs in lock-step: `batch`
    memory          global memory by tensors: `global_access`
    shared_memory   with its races: `shared_history`; `copies` (cp.async), `warpgroups` (wgmma),
                    `matrices` (mma.sync)
    counters        sectors, wavefronts, warps of each block
    launch          hook below the launchers
    samples         an op's samples, compared
    survey          counters at a model's size, of a few CTAs of each of `classes`
    budgets         those that are kept, in counters.csv
    cards           predicted times
"""
