"""Models of transformers: streamed from their files, seen as linear blocks, run in lock-step."""
