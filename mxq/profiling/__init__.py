"""What a calibration set shows of a model: the set itself, its activations, its sensitivities."""
