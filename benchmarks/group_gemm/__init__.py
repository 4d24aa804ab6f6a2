"""Parts of ``bench_group_gemm.py``: what is timed, on which weights, against whom, and the goals."""
