"""What an evaluation shows: figures, sheets of frames, and a page to look at."""
