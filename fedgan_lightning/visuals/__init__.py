"""Pictures: sample grids, scatter plots, partitions, TensorBoard's layout, the progress bar."""
