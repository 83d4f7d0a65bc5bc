"""One walk through a model: what is over is kept and not run again, and of that only what is still read."""
