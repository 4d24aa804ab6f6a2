"""What a person reads about a finished checkpoint: the page, the model card and ``mxq inspect``.

All three draw on the same ``Facts``. Nothing here computes with a model.
"""
