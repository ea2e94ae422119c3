"""The engine: training with one seed or several, checkpoints, what is particular to a device."""
