"""The Triton kernels against plain PyTorch and float64: run by test_triton.py, in a process of their own.

Under TRITON_INTERPRET=1 (which must be set before Triton is first imported) on the CPU, and without it on a GPU.
"""
