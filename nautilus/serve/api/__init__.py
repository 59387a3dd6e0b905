"""The HTTP side of `nautilus serve`: the only place that imports the libraries of the extra `serve`."""
