"""What a checkpoint weighs beside its quantized blocks."""

from mxq.models.adapter import ModelAdapter

HEADER_BYTES = 300
"""At most, for one tensor: its entries in a file's header and in the index."""


def block_budget(adapter: ModelAdapter, size_bytes: int) -> int:
    """Bits left for the quantized blocks of a checkpoint of that size.

    Raises:
        ValueError: If what stays in its type is larger already.
    """
    kept = kept_bytes(adapter)
    if size_bytes <= kept:
        raise ValueError(
            f"--size is {size_bytes:,} bytes, but what stays in its type takes {kept:,}; raise the "
            "size, or quantize more with --scope all"
        )
    return 8 * (size_bytes - kept)


def kept_bytes(adapter: ModelAdapter) -> int:
    """Bytes of a checkpoint beside the blocks: kept tensors, shapes, headers and the index."""
    source = adapter.source
    parameters = dict(source.model.named_parameters())
    kept = sum(
        parameters[name].numel() * source.stored_dtype(name).itemsize
        for name in adapter.coverage.kept
        if source.is_stored(name)
    )
    # A block is up to four named tensors and a stored shape; every name is in a file's header.
    names = 4 * len(adapter.blocks()) + len(adapter.coverage.kept)
    return kept + names * HEADER_BYTES + len(adapter.blocks()) * 16
