"""What the tests look through: each piece makes one kind of silent bug loud.

pages    memory that ends the process when it is touched
fence    tensors between such pages, full of poison: reads and writes out of bounds
virtual  tensors too wide for 32-bit offsets, in next to no memory
observe  every load, store and launch in Triton's interpreter; programs in a random order
races    two programs at one address
workers  cases in a forked process, so that a crash is one red test
known_bad_kernels  kernels with one bug each, to see that the pieces find it

And `selection`: which tests a run takes.
"""
