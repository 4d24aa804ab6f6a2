"""Parts of ``bench_pipeline.py``: cases, models, the clock inside mxq, its runner, the page."""
