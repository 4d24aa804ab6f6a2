"""Parts of ``bench_group_gemm.py``: what is timed, on which weights, beside whom, the goals."""
