"""Parts of `mvwan ablate`: what a grid is, its jobs, what is measured, what follows from it, and how that is shown."""
