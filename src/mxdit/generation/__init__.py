"""Making images and videos: what a directory is, its pipeline, a request, the run, and files of frames."""
