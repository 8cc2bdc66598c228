"""Test harness for Triton kernels: each module makes one kind of silent bug visible; see README.md.

pages              memory pages that end the process when they are accessed
fence              tensors between such pages, full of poison: reads and writes out of bounds
virtual            tensors too wide for 32-bit offsets, in little memory
observe            every load, store and launch in Triton's interpreter; programs in random order
races              two programs of a launch at one address
workers            cases in a forked process, so that a crash fails one case
known_bad_kernels  kernels with one bug each, to test the modules above

`selection` chooses the tests of a run.
"""
