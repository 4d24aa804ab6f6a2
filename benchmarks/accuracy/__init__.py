"""Parts of ``bench_accuracy.py``: the model and its text, own plans, peers, the judge, the page."""
